"""`peregrine quantize`: reads the flags and the calibration text; `engine.compression` writes the checkpoint."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.ipc.messages import EXIT_CODES
from server.complain import complain
from server.settings import LoadedConfig

if TYPE_CHECKING:
    from engine.compression.checkpoint_job import Budget, QuantizeJob, RoundingMethod

FORMATS = ("int4", "int8", "fp8", "bf16")
METHODS = ("rtn", "gptq", "awq")
GROUP_SIZES = ("32", "64", "128", "channel")
OBSERVERS = ("minmax", "mse")
FLAGS: dict[str, tuple[str, ...]] = {  # with the values that they take, where those are few
    "--format": FORMATS,
    "--group-size": GROUP_SIZES,
    "--symmetric": (),
    "--asymmetric": (),
    "--observer": OBSERVERS,
    "--method": METHODS,
    "--calibration": (),
    "--calibration-tokens": (),
    "--make-environment": (),
    "--bits-per-layer": ("auto", "4,8"),
    "--size-budget": (),
}
INTERRUPTED = 130  # as shells say it of Ctrl-C
_DEFAULT_GROUPS = {"int4": "64", "int8": "128"}
_TOKENS = {"gptq": 16_384, "awq": 16_384, "rtn": 2_048}  # of the text, unless it is said; rtn: to choose bits
_CHARS_OF_TOKEN = 32  # at most, on the average: so much of a text is read
_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(GiB|MiB|GB|MB)")
_BITS = re.compile(r"bits=(\d{1,2}(?:\.\d{1,6})?)")
_AUTOMATIC = (4, 6, 8)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags that this command has beside MODEL, --config and --set."""
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write, which must not be there yet")
    command.add_argument(
        "--format", choices=FORMATS, default="int4",
        help="what matrices become (default: int4); bf16 only turns a GGUF file into a directory of floats",
    )  # fmt: skip
    command.add_argument(
        "--group-size", choices=GROUP_SIZES, metavar="32|64|128|channel",
        help="inputs that share a scale (default: 64 of int4, 128 of int8); rows that are not made of such groups get "
        "the next smaller ones",
    )  # fmt: skip
    zeros = command.add_mutually_exclusive_group()
    zeros.add_argument("--symmetric", action="store_true", help="no zero points (the default)")
    zeros.add_argument("--asymmetric", action="store_true", help="a zero point for each group")
    command.add_argument(
        "--observer", choices=OBSERVERS,
        help="how a scale is found: from the largest weight of a group, or with the least squared error (default: mse "
        "of int4, minmax of int8)",
    )  # fmt: skip
    command.add_argument(
        "--method", choices=METHODS,
        help="how weights are rounded (default: rtn, to the nearest; with --calibration: gptq)",
    )  # fmt: skip
    command.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text that gptq and awq learn from")
    command.add_argument(
        "--calibration-tokens", type=_number, metavar="N", help="of the text (default: 16,384; to choose bits: 2,048)"
    )
    command.add_argument(
        "--make-environment", action="store_true",
        help="make the environment that gptq and awq need, if it is not there: about 450 MB below PEREGRINE_CACHE",
    )  # fmt: skip
    command.add_argument(
        "--bits-per-layer", type=_bits, metavar="auto|4,8",
        help="choose each layer's bits by what they change of the answers to the calibration text; auto: of 4, 6, 8",
    )  # fmt: skip
    command.add_argument(
        "--size-budget", type=str, metavar="0.6GiB|bits=4.5",
        help="what --bits-per-layer may spend: on all weight files, or on a quantised weight with its scales",
    )  # fmt: skip


def quantize(loaded: LoadedConfig, parsed: argparse.Namespace) -> int:
    """Writes the checkpoint. The exit code."""
    from engine.compression.calibration_environment import make_environment
    from engine.compression.checkpoint_job import describe
    from engine.models.model_error import ModelError

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        job = _job(loaded, parsed)
        if parsed.make_environment:
            make_environment()
        written = job.run(_say)
    except (ModelError, ValueError, OSError, MemoryError) as error:
        kind = "memory" if isinstance(error, MemoryError) else str(getattr(error, "kind", "config"))
        complain(f"{kind}: {error}")
        return EXIT_CODES[kind]
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    print(describe(written))
    print(f"the checkpoint is in {parsed.output}")
    return 0


def _job(loaded: LoadedConfig, parsed: argparse.Namespace) -> QuantizeJob:
    """ValueError for flags that do not go together."""
    from engine.compression.checkpoint_job import QuantizeJob
    from engine.compression.output_folder import check_is_free
    from engine.compression.weight_scheme import WeightScheme

    config = loaded.config.engine_config()
    check_is_free(parsed.output)
    _check_flags(parsed)
    bits: tuple[int, ...] = parsed.bits_per_layer or ()
    method: RoundingMethod = parsed.method or ("gptq" if parsed.calibration is not None and not bits else "rtn")
    if (method != "rtn" or bits) and parsed.calibration is None:
        needed = "--bits-per-layer" if method == "rtn" else f"--method {method}"
        raise ValueError(f"{needed} learns from a text of the kind that the model is for; add --calibration FILE")
    if method == "rtn" and not bits and parsed.calibration is not None:
        raise ValueError("--method rtn learns nothing from --calibration; leave one of them out")
    budget = None if parsed.size_budget is None else _budget(parsed.size_budget)
    if bits and budget is None:
        raise ValueError("--bits-per-layer needs --size-budget, such as 0.6GiB, or bits=4.5")
    if budget is not None and not bits:
        raise ValueError("--size-budget is what --bits-per-layer may spend; add --bits-per-layer auto")
    scheme = None
    if parsed.format == "fp8":
        scheme = WeightScheme(8, is_float=True)
    elif parsed.format != "bf16":
        group = parsed.group_size or _DEFAULT_GROUPS[parsed.format]
        scheme = WeightScheme(
            4 if parsed.format == "int4" else 8,
            group_size=None if group == "channel" else int(group),
            is_symmetric=not parsed.asymmetric,
            observer=parsed.observer or ("mse" if parsed.format == "int4" else "minmax"),
        )
    sequences = _sequences(loaded, parsed.calibration, parsed.calibration_tokens or _TOKENS[method])
    return QuantizeJob(
        model=config.model,
        output=parsed.output,
        scheme=scheme,
        method=method,
        sequences=sequences,
        bits=bits,
        budget=budget,
        seed=config.seed,
    )


def _check_flags(parsed: argparse.Namespace) -> None:
    of_integers = {
        "--group-size": parsed.group_size, "--asymmetric": parsed.asymmetric, "--observer": parsed.observer,
        "--bits-per-layer": parsed.bits_per_layer, "--calibration": parsed.calibration,
    }  # fmt: skip
    given = [name for name, value in of_integers.items() if value]
    if parsed.format in ("fp8", "bf16") and (given or parsed.method not in (None, "rtn")):
        name = given[0] if given else f"--method {parsed.method}"
        raise ValueError(f"{name} is for integers, and --format is {parsed.format}; leave it out, or use int4 or int8")
    if parsed.observer and parsed.method in ("gptq", "awq"):
        raise ValueError(f"--observer is for --method rtn; {parsed.method} finds its own scales; leave it out")
    if parsed.method == "awq" and parsed.bits_per_layer:
        raise ValueError(
            "--method awq scales the inputs of layers together, so bits cannot be chosen by layer; use gptq"
        )


def _sequences(loaded: LoadedConfig, file: Path | None, num_tokens: int) -> list[list[int]]:
    """The first tokens of the text, in pieces that the model reads by themselves."""
    if file is None:
        return []
    from engine.loading.loader import read_tokenizer
    from server.text.tokenizer import Tokenizer
    from server.training.training_prompts import read_texts

    tokenizer = Tokenizer(read_tokenizer(loaded.config.engine_config().model, report=_say))
    found: list[list[int]] = []
    for piece in read_texts(tokenizer, file, flag="--calibration", max_chars=_CHARS_OF_TOKEN * num_tokens):
        if num_tokens < 2:
            break
        found.append(piece[:num_tokens])
        num_tokens -= len(found[-1])
    if not found:
        raise ValueError(f"--calibration: {file} has less than two tokens; give more text")
    return found


def _budget(text: str) -> Budget:
    from engine.compression.checkpoint_job import Budget

    if match := _BITS.fullmatch(text.strip()):
        return Budget(bits=float(match[1]))
    if match := _SIZE.fullmatch(text.strip()):
        return Budget(num_bytes=int(float(match[1]) * _UNITS[match[2]]))
    raise ValueError(f"--size-budget is {text[:40]!r}, but it must be a size such as 0.6GiB or 500MB, or bits=4.5")


def _bits(text: str) -> tuple[int, ...]:
    if text == "auto":
        return _AUTOMATIC
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) == 1 and 2 <= int(part) <= 8 for part in parts) or len(set(parts)) < 2:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither auto nor two or more of 2 to 8, such as 4,8")
    return tuple(sorted({int(part) for part in parts}))


def _number(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if not 16 <= number <= 100_000_000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 16 to 100,000,000")
    return number


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(phase: str, detail: str) -> None:
    print(f"{phase}: {detail}" if detail else phase, file=sys.stderr, flush=True)
