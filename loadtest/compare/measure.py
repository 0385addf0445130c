"""One measurement: a scenario against a server, with everything that belongs into the record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from loadtest.client.client import Client, Target
from loadtest.client.discovery import calibrate, first_model, server_version
from loadtest.client.draft_counters import read_draft_counters
from loadtest.client.outcome import Failure, Outcome
from loadtest.compare.processes import memory_of
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan, index_of, run
from loadtest.report.session import Measurement, Sample, Scenario, Server
from loadtest.report.slo import ServiceLevel
from loadtest.report.statistics import Figures, summarize
from loadtest.workload.arrivals import ClosedLoop, OpenLoop
from loadtest.workload.prompts import AnyWorkload, PromptText


@dataclass(frozen=True)
class Peer:
    """A server under test.

    sends_text: words, not token ids
    pid: its process on this machine, to read its memory
    version: for servers that do not tell theirs
    precision: how its weights are kept, in words
    speculation: how a server of ours speculates, as JSON
    """

    name: str
    target: Target
    sends_text: bool = False
    pid: int | None = None
    version: str | None = None
    precision: str = ""
    speculation: str = ""


@dataclass(frozen=True)
class Case:
    """A scenario in the objects that run it. keeps_samples: of each request, for plots over time"""

    name: str
    workload: AnyWorkload
    plan: Plan
    keeps_samples: bool = False

    def scenario(self) -> Scenario:
        arrivals, workload = self.plan.arrivals, self.workload
        return Scenario(
            name=self.name,
            prompt_length=str(workload.prompt_length),
            output_length=str(workload.output_length),
            concurrency=arrivals.concurrency if isinstance(arrivals, ClosedLoop) else None,
            rate=arrivals.rate if isinstance(arrivals, OpenLoop) else None,
            arrivals="" if isinstance(arrivals, ClosedLoop | OpenLoop) else str(arrivals),
            num_requests=self.plan.num_requests,
            duration=self.plan.duration,
            num_shared_tokens=workload.num_shared_tokens,
            shared_fraction=workload.shared_fraction if workload.num_shared_tokens else 0.0,
            workload=workload.name,
        )


@dataclass(frozen=True)
class ReadyPeer:
    """A peer that has answered: its model's name is known, and how many words make a token where it takes text."""

    peer: Peer
    server: Server
    text: PromptText | None


async def prepare(peer: Peer, *, seed: int) -> ReadyPeer:
    """Asks the server for its model and version. Raises ValueError if it cannot be reached or used."""
    model = peer.target.model or await first_model(peer.target)
    version = peer.version or await server_version(peer.target)
    peer = replace(peer, target=replace(peer.target, model=model))
    text = await calibrate(peer.target, seed=seed) if peer.sends_text else None
    extra = msgspec.json.encode(dict(peer.target.extra_body)).decode()
    server = Server(
        peer.name,
        peer.target.base_url,
        model,
        version,
        str(peer.target.api),
        extra,
        precision=peer.precision,
        speculation=peer.speculation,
    )
    return ReadyPeer(peer, server, text)


async def measure(
    ready: ReadyPeer, case: Case, *, round: int, service_level: ServiceLevel | None, progress: Progress
) -> tuple[Measurement, dict[int, Outcome]]:
    """Runs the case once: its record, and the outcomes by the number of their exchange.

    Prompts differ from round to round, and are the same for every server of a round.
    """
    workload = case.workload.of_stream(round, ready.text)
    drafts_before = await read_draft_counters(ready.peer.target)
    async with Client(ready.peer.target) as client:
        processor_before, wall_before = time.process_time(), time.perf_counter()
        outcomes = await run(client, workload, case.plan, progress=progress)
        processor, wall = time.process_time() - processor_before, time.perf_counter() - wall_before
        num_events = client.num_events
    memory = None if ready.peer.pid is None else memory_of(ready.peer.pid)
    drafts = await read_draft_counters(ready.peer.target)
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    measurement = Measurement(
        server=ready.peer.name,
        scenario=case.name,
        round=round,
        figures=summarize(list(outcomes.values()), service_level),
        busy_cores=None,
        is_disturbed=False,
        memory=None if memory is None else memory.held,
        client_seconds_per_event=processor / num_events if num_events else None,
        client_load=processor / wall,
        failure_examples={failure.kind: failure.detail for failure in reversed(failures)},  # the first of each
        resident_memory=None if memory is None else memory.resident,
        drafts=drafts.since(drafts_before) if drafts is not None and drafts_before is not None else None,
        kinds=_figures_by_kind(workload, outcomes, service_level),
        samples=_samples(workload, outcomes) if case.keeps_samples else [],
    )
    return measurement, outcomes


def _figures_by_kind(
    workload: AnyWorkload, outcomes: Mapping[int, Outcome], service_level: ServiceLevel | None
) -> dict[str, Figures]:
    kinds: dict[str, list[Outcome]] = {}
    for number, outcome in outcomes.items():
        kinds.setdefault(workload.kind_of(index_of(number)[0]), []).append(outcome)
    return {kind: summarize(each, service_level) for kind, each in sorted(kinds.items()) if kind}


def _samples(workload: AnyWorkload, outcomes: Mapping[int, Outcome]) -> list[Sample]:
    start = min(outcome.started_at for outcome in outcomes.values())
    samples = [_sample(workload, number, outcome, start) for number, outcome in outcomes.items()]
    return sorted(samples, key=lambda sample: sample.at)


def _sample(workload: AnyWorkload, number: int, outcome: Outcome, start: float) -> Sample:
    index, turn = index_of(number)
    kind, at = workload.kind_of(index), round(outcome.started_at - start, 6)
    if isinstance(outcome, Failure):
        seconds = round(outcome.failed_at - outcome.started_at, 6)
        return Sample(at, 0.0, 0.0, 0.0, seconds, 0, 0, kind, turn, error=outcome.kind)
    return Sample(
        at,
        round(outcome.time_to_first_token, 6),
        round(outcome.time_per_output_token or 0.0, 6),
        round(max(outcome.gaps, default=0.0), 6),
        round(outcome.end_to_end, 6),
        outcome.num_prompt_tokens,
        outcome.num_output_tokens,
        kind,
        turn,
    )
