"""One measurement: a scenario against a server, with everything that belongs into the record."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import msgspec

from loadtest.client.client import Client, Target
from loadtest.client.discovery import calibrate, first_model, server_version
from loadtest.client.draft_counters import read_draft_counters
from loadtest.client.outcome import Failure, Outcome
from loadtest.compare.processes import memory_of
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan, run
from loadtest.report.session import Measurement, Scenario, Server
from loadtest.report.slo import ServiceLevel
from loadtest.report.statistics import summarize
from loadtest.workload.arrivals import ClosedLoop, OpenLoop
from loadtest.workload.prompts import PromptText
from loadtest.workload.written import AnyWorkload


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
    """A scenario in the objects that run it."""

    name: str
    workload: AnyWorkload
    plan: Plan

    def scenario(self) -> Scenario:
        arrivals, workload = self.plan.arrivals, self.workload
        return Scenario(
            name=self.name,
            prompt_length=str(workload.prompt_length),
            output_length=str(workload.output_length),
            concurrency=arrivals.concurrency if isinstance(arrivals, ClosedLoop) else None,
            rate=arrivals.rate if isinstance(arrivals, OpenLoop) else None,
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
    )
    return measurement, outcomes
