"""`python -m loadtest spec`: a server for each method of speculation, beside the same server without.

A comparison for each workload, of servers that this starts; what is written here is which servers and which prompts,
and the check that the methods do not change a text.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import msgspec

from loadtest.client.client import Api
from loadtest.client.outcome import Answer, Outcome
from loadtest.compare.launch import free_ports
from loadtest.compare.measure import Case
from loadtest.compare.runner import Plan
from loadtest.planning import PeerText
from loadtest.report.session import Measurement
from loadtest.workload.arrivals import ClosedLoop
from loadtest.workload.written import Author, WrittenWorkload, write_copied, write_question

REFERENCE = "none"
METHODS = ("ngram", "suffix", "medusa")
SERVER = "exec $PYTHON -m server.cli serve {model} --host 127.0.0.1 --port {port} --max-num-seqs 64 {speculation}"


@dataclass(frozen=True)
class Kind:
    """What is asked, and how. A temperature above 0 goes with a seed for each request."""

    author: Author
    api: Api
    temperature: float = 0.0


WORKLOADS = {
    "chat": Kind(write_question, Api.CHAT),
    "copy": Kind(write_copied, Api.COMPLETIONS),
    "sampled": Kind(write_question, Api.CHAT, temperature=1.0),
}


def parse_method(text: str) -> tuple[str, str]:
    """A method's name and its speculation as JSON, of `NAME=JSON`, or `NAME` for that method as it is by default."""
    name, separator, config = text.partition("=")
    try:
        known = msgspec.json.decode(config, type=dict) if separator else {"method": name}
    except msgspec.DecodeError as error:
        raise ValueError(f'{text!r} is no method: write NAME=JSON, as in ngram=\'{{"method":"ngram"}}\'') from error
    if not name or not isinstance(known.get("method"), str) or "," in name:
        raise ValueError(f'{text!r} is no method: it takes a name and a JSON object that says "method"')
    if name == REFERENCE and known["method"] != "none":
        raise ValueError(f"{REFERENCE} is the server without speculation; give {text!r} another name")
    return name, msgspec.json.encode(known).decode()


def parse_workloads(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in WORKLOADS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no workload has that name; there are {', '.join(WORKLOADS)}")
    return text.split(",")


def options_of(options: argparse.Namespace, workload: str) -> argparse.Namespace:
    """The options of a comparison of all methods on one workload. The first peer is the reference."""
    os.environ.setdefault("PYTHON", sys.executable)  # the command is kept in files: it names no folder
    methods = dict([(REFERENCE, '{"method":"none"}'), *(options.method or map(parse_method, METHODS))])
    peers, commands = [], []
    for (name, config), port in zip(methods.items(), free_ports(len(methods)), strict=True):
        flag = "" if name == REFERENCE else f"--speculative-config {shlex.quote(config)}"
        values = {"{port}": str(port), "{model}": options.model or "", "{speculation}": flag}
        command = options.server_command
        for placeholder, value in values.items():
            command = command.replace(placeholder, value)
        peers.append(PeerText(name, f"http://127.0.0.1:{port}", {"speculation": config}))
        commands.append((name, command))
    kind = WORKLOADS[workload]
    own = {
        "workload": workload,
        "name": f"{options.name}-{workload}",
        "peer": [*peers, *options.peer],
        "peer_command": [*commands, *options.peer_command],
        "model": None,  # the name that a server has for it
        "api": kind.api,
        "prompts": "text",
        "temperature": kind.temperature,
    }
    return argparse.Namespace(**(vars(options) | own))


def speculation_cases(options: argparse.Namespace, *, seed: int) -> list[Case]:
    """A case for each load: four requests for each client, for many two, and at least eight."""
    kind = WORKLOADS[options.workload]
    written = WrittenWorkload(options.workload, kind.author, options.output, seed, sends_seeds=kind.temperature > 0)
    cases = []
    for clients in options.concurrency:
        num_requests = options.requests or max(8, 2 * clients, min(4 * clients, 32))
        warmup = clients if options.warmup is None else options.warmup
        plan = Plan(ClosedLoop(clients), num_requests, None, warmup)
        cases.append(Case(f"{options.workload}, {plan.arrivals}", written, plan))
    return cases


@dataclass
class Watcher:
    """Tells of each run in a line, and finds texts that differ between servers whose drafts may not change any.

    exact: the names of those servers. A text is compared with the first server's that answered the same request.
    """

    exact: Collection[str]
    num_rounds: int
    num_compared: int = 0
    differences: list[str] = field(default_factory=list)
    _texts: dict[tuple[str, int, int], tuple[str, str]] = field(default_factory=dict)  # by request: server, text
    _rates: dict[int, float] = field(default_factory=dict)  # of the reference, by turn

    def __call__(self, measurement: Measurement, outcomes: Mapping[int, Outcome]) -> None:
        before = len(self.differences)
        if measurement.server in self.exact:
            for index, outcome in outcomes.items():
                if isinstance(outcome, Answer):
                    self._compare(measurement, index, outcome.text)
        print(self._line(measurement, len(self.differences) - before), file=sys.stderr, flush=True)

    def _compare(self, run: Measurement, index: int, text: str) -> None:
        other, expected = self._texts.setdefault((run.scenario, run.round, index), (run.server, text))
        if other == run.server:
            return
        self.num_compared += 1
        if text != expected:
            at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
            at = min(len(text), len(expected)) if at is None else at
            theirs, own = (repr(each[max(at - 20, 0) : at + 20]) for each in (expected, text))
            self.differences.append(
                f"{run.scenario}, stream {run.round}, request {index}, from character {at}: "
                f"{other} said {theirs}, {run.server} said {own}"
            )

    def _line(self, run: Measurement, num_different: int) -> str:
        figures, rate = run.figures, run.figures.output_tokens_per_second
        if run.server == REFERENCE:
            self._rates[run.turn] = rate
        reference = self._rates.get(run.turn)
        num_drafted = figures.num_accepted_drafts + figures.num_rejected_drafts
        accepted = f", {figures.num_accepted_drafts / num_drafted:.0%} of drafts accepted" if num_drafted else ""
        failed = f", {figures.num_failures} failed: {run.failure_examples}" if figures.num_failures else ""
        notes = accepted + failed + (f", {num_different} TEXTS DIFFER" if num_different else "")
        notes += ", disturbed" if run.is_disturbed else ""
        ratio = f" ({rate / reference:.2f})" if reference else ""
        number = run.turn % self.num_rounds + 1
        return f"{run.scenario}, pair {number} of {self.num_rounds}: {run.server} {rate:.0f} tok/s{ratio}{notes}"
