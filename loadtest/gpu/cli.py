"""`python -m loadtest.gpu`: everything that is measured on a GPU, in one command that ends in time."""

from __future__ import annotations

import argparse
import secrets
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from loadtest.extra import check_extra
from loadtest.gpu.records import Check, SectionResult, Session, Tuned, load
from loadtest.gpu.sections import SECTIONS
from loadtest.report.environment import read_environment
from loadtest.report.result_files import save_result

ROOT = Path(__file__).resolve().parents[2]
_TUNING = ("machine", "compile", "tune")
_PACKAGES = ("torch", "triton", "transformers")


def main(arguments: list[str] | None = None) -> int:
    """0: measured, and every kernel is right; 1: a kernel is wrong or nothing was found; 2: it could not be tried."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.command != "wheels":
        check_extra("tabulate")
    try:
        if options.command == "table":
            from loadtest.gpu import tables

            print(tables.markdown(load(options.file) if options.file.exists() else None))
            return 0
        if options.command == "wheels":
            from loadtest.gpu.wheels import collect

            return collect(options.folder, with_flash=not options.without_flash, with_cpu=options.with_cpu)
        return _measure(options, shlex.join(["python", "-m", "loadtest.gpu", *arguments]))
    except (ValueError, OSError) as error:
        print(f"loadtest.gpu: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_run(parser)
    _add_run(commands.add_parser("tune", help="only the tile shapes: writes kernels/configs/CHIP.json"), tuning=True)
    table = commands.add_parser("table", help="the README's table, out of a result file")
    table.add_argument("file", type=Path)
    wheels = commands.add_parser("wheels", help="collect what a machine with torch, triton and transformers lacks")
    wheels.add_argument("folder", type=Path)
    wheels.add_argument("--without-flash", action="store_true", help="no FlashAttention-3 (10 MB; 280 MB to download)")
    wheels.add_argument("--with-cpu", action="store_true", help="numba and llvmlite too, which only the CPU path uses")
    return parser


def _add_run(parser: argparse.ArgumentParser, *, tuning: bool = False) -> None:
    default = _TUNING if tuning else tuple(SECTIONS)
    parser.add_argument("--sections", type=_sections, default=list(default), metavar="A,B", help=",".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together (7.5)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: does the command itself work?")
    parser.add_argument("--results", type=Path, help="folder for the results (loadtest/results/CHIP)")
    parser.add_argument("--tables", type=Path, help="folder for tile shapes (kernels/configs)")
    parser.add_argument("--commit", help="of the checkout, where git cannot be asked")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a new one, recorded)")


def _sections(text: str) -> list[str]:
    """The chosen sections, in the order in which they build on each other."""
    asked = text.split(",")
    unknown = set(asked) - set(SECTIONS)
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def _measure(options: argparse.Namespace, command: str) -> int:
    from loadtest.gpu import tables
    from loadtest.gpu.runner import Settings, run_sections

    if options.minutes <= 0:
        raise ValueError(f"{options.minutes:g} minutes are no time; give --minutes a number above 0")
    device = "CPU, a rehearsal" if options.rehearse else _gpu()
    results = options.results or ROOT / "loadtest" / "results" / device.lower().replace(" ", "-")
    if options.rehearse and (options.results is None):
        raise ValueError("a rehearsal's results are worth nothing; name a folder for them in --results")
    settings = Settings(
        sections=options.sections,
        minutes=options.minutes,
        is_rehearsal=options.rehearse,
        seed=secrets.randbelow(1 << 30) if options.seed is None else options.seed,
        tables=options.tables or (results if options.rehearse else ROOT / "kernels" / "configs"),
    )
    session = _empty_session(command, settings.seed, device, options)
    path = results / f"{time.strftime('%Y-%m-%d-%H%M%S', time.gmtime())}-gpu.json"

    def keep(section: SectionResult) -> None:
        others = [other for other in session.sections if other.name != section.name]
        session.sections[:] = [*others, section]
        save_result(session, path)

    def done(section: SectionResult) -> None:
        keep(section)
        for name in {record.table for record in section.records if isinstance(record, Tuned)}:
            if settings.tables != results:  # a copy, for where only the results leave the machine
                shutil.copy(settings.tables / name, results)
        print(tables.terminal_text(section), flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are ended on the way out
    run_sections(settings, keep, done)
    print(f"\n{tables.goal_table(session)}\n\n{path}")
    return 0 if _is_right(session) else 1


def _is_right(session: Session) -> bool:
    checks = [record for record in session.records if isinstance(record, Check)]
    return bool(session.records) and all(check.is_ok for check in checks)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --rehearse tries the command on a CPU")
    name: str = torch.cuda.get_device_name()
    return name


def _empty_session(command: str, seed: int, device: str, options: argparse.Namespace) -> Session:
    environment = read_environment()
    versions = environment.packages
    packages = {"python": environment.python} | {name: versions[name] for name in _PACKAGES if name in versions}
    if options.commit:
        environment = replace(environment, commit=options.commit)
    return Session(
        command=command,
        is_rehearsal=options.rehearse,
        seed=seed,
        device=device,
        environment=environment,
        packages=packages,
        sections=[],
    )
