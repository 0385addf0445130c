"""The command line: what can be asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loadtest.client import Api, IgnoreEos
from loadtest.lengths import parse_length
from loadtest.peer_text import parse_extra_body, parse_peer
from loadtest.slo import parse_service_level

Parsed = TypeVar("Parsed")

COMMANDS = ("run", "sweep", "compare", "table")


def parse(arguments: list[str]) -> argparse.Namespace:
    """`run` is the command if none is named."""
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description="Measures OpenAI-compatible servers. Without a command: run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one load against one server")
    _add_url(run)
    _add_load(run)
    _add_target(run)
    run.add_argument("--json", type=Path, metavar="FILE", help="write the result there (- : standard output)")
    sweep = commands.add_parser("sweep", help="several loads against one server: latency over throughput")
    _add_url(sweep)
    _add_load(sweep, many=True)
    _add_target(sweep)
    _add_results(sweep, "sweep")
    compare = commands.add_parser("compare", help="several servers in turns; ratios to the first")
    compare.add_argument(
        "--peer",
        action="append",
        required=True,
        type=_checked(parse_peer),
        metavar="NAME=URL[,key=value...]",
        help="a server; keys: model, api, prompts (tokens|text), ignore_eos, extra (JSON), api_key, done (yes|no), "
        "pid, version, precision (any words)",
    )
    _add_starting(compare)
    compare.add_argument("--rounds", type=_positive_int, default=3, help="times each server has its turn (3)")
    compare.add_argument("--prefill", type=_positive_int, metavar="TOKENS", help="also prompts of so many, 1 output")
    compare.add_argument("--prefill-concurrency", type=_positive_int, default=4, help="requests at once in that (4)")
    compare.add_argument("--prefill-requests", type=_positive_int, default=16, help="requests per round of that (16)")
    compare.add_argument(
        "--quiet", type=float, metavar="CORES", help="wait until fewer are in use, repeat disturbed runs"
    )
    _add_load(compare, many=True)
    _add_target(compare)
    _add_results(compare, "compare")
    table = commands.add_parser("table", help="the README's table, out of a result file")
    table.add_argument("file", type=Path)
    return parser


def _add_starting(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers that are started here")
    group.add_argument(
        "--peer-command",
        action="append",
        default=[],
        type=_named_command,
        metavar="NAME='COMMAND'",
        help="a shell command that starts that peer: the time to its first answer and its memory are measured",
    )
    group.add_argument("--starts", type=_positive_int, default=1, help="start each so many times, for the median (1)")
    group.add_argument("--start-patience", type=_positive_float, default=300.0, help="seconds to its answer (300)")
    group.add_argument(
        "--freeze-idle", action="store_true", help="pause servers that are started here, or have a pid, between turns"
    )
    group.add_argument("--one-at-a-time", action="store_true", help="start and end each server in every round")
    parser.add_argument(
        "--ours", type=_names, default=[], metavar="NAME[,NAME...]", help="whose best is compared (the first peer)"
    )


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    parser.add_argument("--pid", type=int, help="the server's process on this machine, to read its memory")


def _add_load(parser: argparse.ArgumentParser, many: bool = False) -> None:
    plural = "; several with commas" if many else ""
    number, rate = (_positive_ints, _positive_floats) if many else (_positive_int, _positive_float)
    group = parser.add_argument_group("load")
    arrivals = group.add_mutually_exclusive_group()
    arrivals.add_argument("--concurrency", type=number, help=f"closed loop: requests at once (default 8){plural}")
    arrivals.add_argument("--rate", type=rate, help=f"open loop: Poisson arrivals per second{plural}")
    group.add_argument("--requests", type=_positive_int, help="how many (default: 8 * concurrency, at least 16)")
    group.add_argument("--duration", type=_positive_float, help="seconds after which no more are sent")
    group.add_argument("--warmup", type=int, help="requests before, not counted (default: the concurrency, or 8)")
    length = _checked(parse_length)
    group.add_argument("--prompt", type=length, default="128", help="tokens: 128, uniform:64:256, lognormal:128:0.5")
    group.add_argument("--output", type=length, default="64", help="tokens, written the same way")
    group.add_argument("--shared-prefix-tokens", type=int, default=0, help="tokens that prompts begin with alike")
    group.add_argument("--shared-prefix-fraction", type=_fraction, default=1.0, help="share of prompts that do (1)")
    group.add_argument("--seed", type=int, help="of prompts, lengths and arrivals (default: a new one, reported)")
    group.add_argument("--slo", type=_checked(parse_service_level), help="ttft=500ms,tpot=..,itl=50ms,e2e=..: goodput")


def _add_target(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to speak to the server")
    group.add_argument("--model", help="default: the first that the server lists")
    group.add_argument("--api", choices=[str(api) for api in Api], default="completions")
    group.add_argument("--prompts", choices=["tokens", "text"], help="token ids, or words (default with chat)")
    group.add_argument("--token-ids", type=_id_range, default="1000:30000", metavar="LOW:HIGH", help="ids to draw from")
    group.add_argument("--ignore-eos", choices=[str(way) for way in IgnoreEos], default="sent", help="see the README")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--extra-body", type=_checked(parse_extra_body), default="{}", help="JSON laid over each body")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    group.add_argument("--timeout", type=_positive_float, default=600.0, help="seconds for an answer (600)")
    group.add_argument("--keep-alive", action="store_true", help="use connections again (default: one per request)")
    group.add_argument("--done", choices=["yes", "no"], default="yes", help="no: streams end without [DONE]")


def _add_results(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--results", type=Path, default=Path("loadtest/results"), help="folder (loadtest/results)")
    parser.add_argument("--name", default=name, help=f"in the file's name after the date ({name})")


# types for argparse, whose message for a ValueError would lose the text


def _checked(parser: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    def parse_or_explain(text: str) -> Parsed:
        try:
            return parser(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


def _positive_float(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def _fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def _positive_ints(text: str) -> list[int]:
    return [_positive_int(part) for part in text.split(",")]


def _positive_floats(text: str) -> list[float]:
    return [_positive_float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def _named_command(text: str) -> tuple[str, str]:
    name, separator, command = text.partition("=")
    if not (name and separator and command.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is no command of a peer; write NAME='COMMAND'")
    return name, command


def _id_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not 0 <= int(low) < int(high):
        raise argparse.ArgumentTypeError(f"{text} is no range of token ids; write LOW:HIGH, as in 1000:30000")
    return int(low), int(high)
