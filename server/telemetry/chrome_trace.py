"""The flight recorder's steps and the history's requests in Chrome's trace event format, for Perfetto and chrome://tracing.

The format: "Trace Event Format" (Google, 2016). Complete events (ph X) are steps and their phases, async ones (b, e)
requests and what they went through, counters (C) what changes from step to step; times in microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec

from server.telemetry.flight_recorder import EngineEvent, RecordedStep
from server.telemetry.request_timeline import Timeline

STEPS_PER_CHUNK = 200  # a millisecond or two of work, between which others have their turn
ENGINE, REQUESTS = 1, 2  # "processes" of the trace

Arguments = dict[str, int | float | str]
encode = msgspec.json.Encoder().encode


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    ph: str
    ts: float
    pid: int
    tid: int = 0
    dur: float | None = None
    cat: str = ""
    id: str = ""
    s: str = ""  # of an instant event: p shows it across the process
    args: Arguments | None = None


def trace_chunks(
    steps: Sequence[RecordedStep], events: Sequence[EngineEvent], timelines: Sequence[Timeline]
) -> Iterator[bytes]:
    """The file, piece by piece. Moments are counted from the first step; the metadata says when that was."""
    starts = [step.stats.started_at for step in steps[:1]] or [event.at for event in events[:1]] or [time.monotonic()]
    origin = starts[0]
    unix = time.time() - (time.monotonic() - origin)
    yield b'{"displayTimeUnit":"ms","metadata":{"origin_unix_seconds":%.6f},"traceEvents":[' % unix
    yield b",".join(encode(event) for event in _names())
    shown = [event for event in events if event.at >= origin]
    yield b"".join(b"," + encode(_instant(event, origin)) for event in shown)
    counted: dict[str, Arguments] = {}
    for first in range(0, len(steps), STEPS_PER_CHUNK):
        chunk = steps[first : first + STEPS_PER_CHUNK]
        yield b"".join(b"," + encode(event) for step in chunk for event in _step_events(step, origin, counted))
    for number, timeline in enumerate(timelines):
        if timeline.ended_at is None or timeline.ended_at >= origin:
            yield b"".join(b"," + encode(event) for event in _request_events(timeline, str(number), origin))
    yield b"]}\n"


def _names() -> Iterator[Event]:
    for pid, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
        yield Event(name="process_name", ph="M", ts=0.0, pid=pid, args={"name": name})
    yield Event(name="thread_name", ph="M", ts=0.0, pid=ENGINE, args={"name": "steps"})


def _instant(event: EngineEvent, origin: float) -> Event:
    return Event(
        name=event.name, ph="i", ts=_micro(event.at - origin), pid=ENGINE, s="p", args={"detail": event.detail}
    )


def _step_events(step: RecordedStep, origin: float, counted: dict[str, Arguments]) -> Iterator[Event]:
    """counted: what the counters showed last; only what has changed is an event"""
    stats = step.stats
    at = stats.started_at - origin
    arguments: Arguments = {
        "tokens": stats.num_tokens,
        "prompt_tokens": stats.num_prompt_tokens,
        "sequences": stats.num_seqs,
        "output_tokens": stats.num_output_tokens,
        "draft_tokens": stats.num_draft_tokens,
        "accepted_drafts": sum(stats.accepted_by_position),
        "preemptions": stats.num_preemptions,
        "delivered_after_us": _micro(max(step.received_at - step.ended_at, 0.0)),
    }
    name = f"{stats.num_tokens} tokens" if stats.num_tokens else "empty"
    yield Event(name=name, ph="X", ts=_micro(at), dur=_micro(stats.seconds), pid=ENGINE, args=arguments)
    phases = {
        "schedule": stats.schedule, "forward": stats.forward, "sample": stats.sample, "update": stats.update,
        "propose": stats.propose,
    }  # fmt: skip
    for phase, seconds in phases.items():
        if seconds > 0.0:
            yield Event(name=phase, ph="X", ts=_micro(at), dur=_micro(seconds), pid=ENGINE)
        at += seconds
    num_free = stats.num_blocks - stats.num_owned_blocks - stats.num_cached_blocks
    counters: dict[str, Arguments] = {
        "sequences": {"running": stats.num_running, "waiting": stats.num_waiting},
        "KV blocks": {"owned": stats.num_owned_blocks, "cached": stats.num_cached_blocks, "free": num_free},
    }
    for name, values in counters.items():
        if counted.get(name) != values:
            counted[name] = values
            yield Event(name=name, ph="C", ts=_micro(stats.started_at - origin), pid=ENGINE, args=values)


def _request_events(timeline: Timeline, number: str, origin: float) -> Iterator[Event]:
    """A request, and below it its time before the queue, in it, in prefill and in decoding."""
    timeline.refresh()
    name = timeline.response_id or timeline.request_id
    counts, end = timeline.counts, time.monotonic() if timeline.ended_at is None else timeline.ended_at
    arguments: Arguments = {
        "outcome": timeline.outcome or "running",
        "prompt_tokens": counts.num_prompt_tokens,
        "cached_tokens": counts.num_cached_tokens,
        "output_tokens": counts.num_output_tokens,
    }
    yield from _span(name, timeline.arrived_at - origin, end - origin, number, arguments)
    for part, start, stop in _parts(timeline, end):
        yield from _span(part, start - origin, stop - origin, number, {})


def _parts(timeline: Timeline, end: float) -> Iterator[tuple[str, float, float]]:
    if timeline.admitted_at is None:
        return
    yield "before the queue", timeline.arrived_at, timeline.admitted_at
    first = timeline.first_timing
    if timeline.first_token_at is None:
        yield "queued or in prefill", timeline.admitted_at, end
        return
    if first is None:
        yield "until the first token", timeline.admitted_at, timeline.first_token_at
    else:
        started_at = min(timeline.admitted_at + first.queued, timeline.first_token_at)
        yield "queued", timeline.admitted_at, started_at
        yield "prefill", started_at, timeline.first_token_at
    yield "decode", timeline.first_token_at, end


def _span(name: str, start: float, end: float, number: str, arguments: Arguments) -> Iterator[Event]:
    for ph, at in (("b", start), ("e", end)):
        yield Event(
            name=name, ph=ph, ts=_micro(at), pid=REQUESTS, cat="request", id=number, args=arguments if ph == "b" else {}
        )


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)
