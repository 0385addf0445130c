"""The command line of `python -m loadtest`: its commands and their options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loadtest.client.client import Api, IgnoreEos
from loadtest.operation.runner import SCENARIOS, SOAK
from loadtest.operation.stage import StageOptions
from loadtest.planning import parse_extra_body, parse_peer
from loadtest.report.slo import parse_service_level
from loadtest.speculation import METHODS, SERVER, WORKLOADS, parse_method, parse_workloads
from loadtest.workload.lengths import parse_length

Parsed = TypeVar("Parsed")

COMMANDS = ("run", "sweep", "compare", "scenario", "replay", "search", "spec", "operation", "table")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed options. The command is `run` if none is named; options that a command lacks have their defaults."""
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description="Measures OpenAI-compatible servers. Without a command: run."
    )
    parser.set_defaults(
        rounds=1, prefill=None, quiet=None, freeze_idle=False, one_at_a_time=False, ours=[], scenario=None
    )
    commands = parser.add_subparsers(dest="command", required=True)
    url = argparse.ArgumentParser(add_help=False)
    url.add_argument("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    url.add_argument("--pid", type=int, help="the server's process on this machine, to read its memory")
    one, many, target = _load(many=False), _load(many=True), _target()
    run = commands.add_parser("run", parents=[url, one, target], help="one load against one server")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the result there (- : standard output)")
    sweep = commands.add_parser(
        "sweep", parents=[url, many, target], help="several loads against one server: latency over throughput"
    )
    compare = commands.add_parser(
        "compare", parents=[many, target], help="several servers in turns; ratios to the first"
    )
    _add_comparison(compare)
    scenario = commands.add_parser(
        "scenario", parents=[url, _target(api=None)], help="a scenario's file against one server: latencies over time"
    )
    _add_scenario(scenario)
    replay = commands.add_parser("replay", parents=[url, target], help="a recorded trace against one server")
    _add_replay(replay)
    search = commands.add_parser(
        "search", parents=[url, _target(api=None)], help="the highest rate at which the server keeps its limits"
    )
    _add_search(search)
    speculation = commands.add_parser("spec", help="what each method of speculation gains, in pairs with none")
    _add_speculation(speculation)
    of_results = {"sweep": sweep, "compare": compare, "scenario": scenario, "replay": replay, "search": search}
    for name, command in (*of_results.items(), ("spec", speculation)):
        command.add_argument("--results", type=Path, default=Path("loadtest/results"), help="folder (loadtest/results)")
        command.add_argument("--name", default=name, help=f"in the file's name after the date ({name})")
    operation = commands.add_parser("operation", help="overload, fairness and faults: what a server of ours stands")
    _add_operation(operation)
    table = commands.add_parser("table", help="markdown, out of a result file; of spec, out of its parts together")
    table.add_argument("file", type=Path, nargs="+")
    return parser


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("scenario", metavar="FILE", help="a YAML file, or the name of one that comes with the load generator")
    add("--rate-factor", type=_positive_float, default=1.0, help="times the rates of its arrivals (1)")
    add("--requests", type=_positive_int, help="at most; of conversations, their first turns")
    add("--duration", type=_positive_float, help="seconds after which no more are sent")
    _add_run(parser)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", metavar="TRACE", help="CSV (Azure, BurstGPT, Splitwise) or JSON lines (Mooncake): see the README")
    add("--speed", type=_positive_float, default=1.0, help="times as fast as it was recorded (1)")
    add("--start", type=_seconds_from_0, default=0.0, help="seconds of the trace to leave out at its beginning (0)")
    add("--duration", type=_positive_float, help="seconds of the trace to replay (all)")
    add("--requests", type=_positive_int, help="at most (all)")
    add("--length-scale", type=_positive_float, default=1.0, help="times the recorded lengths (1)")
    add("--max-prompt-tokens", type=_positive_int, help="longer prompts are cut to so many")
    add("--max-output-tokens", type=_positive_int, help="longer answers are cut to so many")
    add("--block-size", type=_positive_int, default=512, help="tokens of a block that a hash id names (512)")
    _add_run(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Options of a run that is reported over time."""
    add = parser.add_argument
    add("--warmup", type=_count, help="requests before, not counted (2)")
    add("--seed", type=int, help="of prompts and arrivals (default: a new one, reported)")
    add("--slo", type=_checked(parse_service_level), help="limits; goodput and dotted lines (the scenario's own)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--slo", type=_checked(parse_service_level), help="limits for the 99th percentiles: ttft=1s,itl=100ms")
    add("--scenario", metavar="FILE", help="the traffic of that scenario, at Poisson arrivals")
    length = _checked(parse_length)
    add("--prompt", type=length, default="128", help="tokens, without a scenario (128)")
    add("--output", type=length, default="64", help="tokens, without a scenario (64)")
    add("--shared-prefix-tokens", type=int, default=0, help="tokens that prompts begin with alike")
    add("--shared-prefix-fraction", type=_fraction, default=1.0, help="share of prompts that do (1)")
    add("--start", type=_positive_float, default=1.0, help="requests per second of the first run (1)")
    add("--lowest", type=_positive_float, default=0.05, help="requests per second (0.05)")
    add("--highest", type=_positive_float, default=1000.0, help="requests per second (1000)")
    add("--precision", type=_positive_float, default=0.1, help="share of the rate to which it is found (0.1)")
    add("--confirmations", type=_count, default=2, help="further runs of the rate that have to be good (2)")
    add("--seconds", type=_positive_float, default=60.0, help="of arrivals in a run (60)")
    add("--min-requests", type=_positive_int, default=20, help="of a run, however long they take (20)")
    add("--max-runs", type=_positive_int, default=30, help="after which the search ends (30)")
    add("--max-seconds", type=_positive_float, help="after which no further run begins")
    add("--warmup", type=_count, help="requests before the first run, not counted (2)")
    add("--seed", type=int, help="of prompts, lengths and arrivals (default: a new one, reported)")


def _add_operation(parser: argparse.ArgumentParser) -> None:
    usual, add = StageOptions(), parser.add_argument
    names = ", ".join(SCENARIOS)
    add("name", nargs="*", type=_checked(_scenario), metavar="NAME", help=f"of {names} (all but {SOAK})")
    add("--list", action="store_true", help="say what each scenario is, and end")
    add("--engine", choices=["default", "counting"], default="default", help="counting: one without a model (default)")
    add("--model", default=usual.model, help=f"({usual.model})")
    add("--duration", type=_positive_float, metavar="SECONDS", help="of the load (as each scenario has it)")
    add("--clients", type=_positive_int, default=usual.num_clients, help=f"at once ({usual.num_clients})")
    add("--output", type=_positive_int, default=usual.max_tokens, help=f"tokens of an answer ({usual.max_tokens})")
    add("--seed", type=int, default=0, help="of prompts, arrivals and chances (0)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every server, before others")
    add("--results", type=Path, help="folder for result files, as loadtest/results")


def _add_speculation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--method",
        action="append",
        type=_checked(parse_method),
        metavar="NAME[=JSON]",
        help=f"a server of ours with that --speculative-config (one each of {', '.join(METHODS)}), beside one without",
    )
    add("--workload", type=_checked(parse_workloads), default=[*WORKLOADS], help=f"of {','.join(WORKLOADS)} (all)")
    add("--concurrency", type=_list(_positive_int, True), default=[1, 2, 4, 8, 16, 32, 64], help="requests at once")
    add("--pairs", dest="rounds", type=_positive_int, default=7, help="times each server has its turn (7)")
    add("--requests", type=_positive_int, help="of a run (4 for each client up to 32, or 2 for each; at least 8)")
    add("--warmup", type=int, help="requests before, not counted (the concurrency)")
    add("--output", type=_checked(parse_length), default="128", help="tokens (128)")
    add("--ignore-eos", choices=["sent", "no"], default="sent", help="no: answers may end early (sent)")
    add("--seed", type=int, help="of prompts and of sampling (default: a new one, reported)")
    add("--model", help="what the servers of ours serve (their default)")
    add("--server-command", default=SERVER, help=f"how they are started ({SERVER})")
    add("--timeout", type=_positive_float, default=600.0, help="seconds for an answer (600)")
    _add_peers(parser, is_required=False)
    parser.set_defaults(freeze_idle=True, starts=1, slo=None, api_key=None, extra_body={}, keep_alive=False, done="yes")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=_positive_int, default=3, help="times each server has its turn (3)")
    add("--prefill", type=_positive_int, metavar="TOKENS", help="also prompts of so many, 1 output")
    add("--prefill-concurrency", type=_positive_int, default=4, help="requests at once in that (4)")
    add("--prefill-requests", type=_positive_int, default=16, help="requests per round of that (16)")
    names = "whose best is compared (the first peer)"
    add("--ours", type=lambda text: text.split(","), default=[], metavar="NAME[,NAME...]", help=names)
    add("--starts", type=_positive_int, default=1, help="start each so many times, for the median (1)")
    paused = "pause servers that are started here, or have a pid, between turns"
    add("--freeze-idle", action="store_true", help=paused)
    add("--one-at-a-time", action="store_true", help="start and end each server in every round")
    _add_peers(parser, is_required=True)


def _add_peers(parser: argparse.ArgumentParser, *, is_required: bool) -> None:
    add = parser.add_argument
    add(
        "--peer",
        action="append",
        default=None if is_required else [],
        required=is_required,
        type=_checked(parse_peer),
        metavar="NAME=URL[,key=value...]",
        help="a server; keys: model, api, prompts (tokens|text), ignore_eos, extra (JSON), api_key, done (yes|no), "
        "pid, version, precision (any words), speculation (JSON, of a server of ours)",
    )
    add("--quiet", type=float, metavar="CORES", help="wait until fewer are in use, repeat disturbed runs")
    add(
        "--peer-command",
        action="append",
        default=[],
        type=_checked(_named_command),
        metavar="NAME='COMMAND'",
        help="a shell command that starts that peer: the time to its first answer and its memory are measured",
    )
    add("--start-patience", type=_positive_float, default=300.0, help="seconds to its answer (300)")


def _load(*, many: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("load")
    several = "; several with commas" if many else ""
    arrivals = group.add_mutually_exclusive_group()
    add = arrivals.add_argument
    add("--concurrency", type=_list(_positive_int, many), help=f"closed loop: requests at once (default 8){several}")
    add("--rate", type=_list(_positive_float, many), help=f"open loop: Poisson arrivals per second{several}")
    add = group.add_argument
    add("--requests", type=_positive_int, help="how many (default: 8 * concurrency, at least 16)")
    add("--duration", type=_positive_float, help="seconds after which no more are sent")
    add("--warmup", type=int, help="requests before, not counted (default: the concurrency, or 8)")
    length = _checked(parse_length)
    add("--prompt", type=length, default="128", help="tokens: 128, uniform:64:256, lognormal:128:0.5")
    add("--output", type=length, default="64", help="tokens, written the same way")
    add("--shared-prefix-tokens", type=int, default=0, help="tokens that prompts begin with alike")
    add("--shared-prefix-fraction", type=_fraction, default=1.0, help="share of prompts that do (1)")
    add("--seed", type=int, help="of prompts, lengths and arrivals (default: a new one, reported)")
    add("--slo", type=_checked(parse_service_level), help="ttft=500ms,tpot=..,itl=50ms,e2e=..: goodput")
    return parser


def _target(api: Api | None = Api.COMPLETIONS) -> argparse.ArgumentParser:
    """api: None: the scenario's"""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("how to speak to the server").add_argument
    add("--model", help="default: the first that the server lists")
    add("--api", choices=[str(each) for each in Api], default=None if api is None else str(api))
    add("--prompts", choices=["tokens", "text"], help="token ids, or words (default with chat)")
    add("--token-ids", type=_checked(_id_range), default="1000:30000", metavar="LOW:HIGH", help="ids to draw from")
    add("--ignore-eos", choices=[str(way) for way in IgnoreEos], default="sent", help="see the README")
    add("--temperature", type=float, default=0.0)
    add("--extra-body", type=_checked(parse_extra_body), default="{}", help="JSON laid over each body")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    add("--timeout", type=_positive_float, default=600.0, help="seconds for an answer (600)")
    add("--keep-alive", action="store_true", help="use connections again (default: one per request)")
    add("--done", choices=["yes", "no"], default="yes", help="no: streams end without [DONE]")
    return parser


def _checked(parser: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """An argparse type that keeps the text of a ValueError, which argparse itself would replace."""

    def parse_or_explain(text: str) -> Parsed:
        try:
            return parser(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


@_checked
def _positive_float(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError(f"{text} is not a number above 0")
    return float(text)


@_checked
def _positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"{text} is below 1")
    return int(text)


@_checked
def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError(f"{text} is below 0")
    return int(text)


@_checked
def _seconds_from_0(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise ValueError(f"{text} is not a number from 0 on")
    return float(text)


@_checked
def _fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(f"{text} is not from 0 to 1")
    return float(text)


def _list(parser: Callable[[str], Parsed], many: bool) -> Callable[[str], list[Parsed]]:
    return lambda text: [parser(part) for part in (text.split(",") if many else [text])]


def _scenario(text: str) -> str:
    name = text.replace("-", "_")
    if name not in SCENARIOS:
        raise ValueError(f"{text!r} is no scenario; there are {', '.join(SCENARIOS)}")
    return name


def _named_command(text: str) -> tuple[str, str]:
    name, separator, command = text.partition("=")
    if not (name and separator and command.strip()):
        raise ValueError(f"{text!r} is no command of a peer; write NAME='COMMAND'")
    return name, command


def _id_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not 0 <= int(low) < int(high):
        raise ValueError(f"{text} is no range of token ids; write LOW:HIGH, as in 1000:30000")
    return int(low), int(high)
