"""The flight recorder: the engine's last steps and what befell it, for whoever asks afterwards why it was slow."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from engine.ipc.messages import ModelInfo
from engine.types import StepStats
from server.telemetry.observers import NullObserver

NUM_STEPS = 10_000
NUM_EVENTS = 200
MAX_STEPS_SEEN = 2_000  # of an interval, for one answer: a millisecond


class RecordedStep(NamedTuple):
    """A step, and when this process heard of it (seconds, time.monotonic)."""

    stats: StepStats
    received_at: float

    @property
    def ended_at(self) -> float:
        return self.stats.started_at + self.stats.seconds


class EngineEvent(NamedTuple):
    """Something that befell the engine's process: ready, died, replay. `at`: seconds, time.monotonic."""

    at: float
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Interval:
    """What the steps did that ran between two moments."""

    num_steps: int
    max_num_running: int
    max_kv_usage: float  # owned share of the KV blocks, 0 to 1
    mean_num_seqs: float  # in a step
    longest: RecordedStep | None


@dataclass(frozen=True, slots=True)
class Pace:
    """What the steps of the last seconds did, per second; 0 while nothing runs."""

    steps: float = 0.0
    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    num_draft_tokens: int = 0  # not per second
    num_accepted_drafts: int = 0


class FlightRecorder(NullObserver):
    """Keeps the numbers that each step has brought, as they came: a step costs one append to a bounded queue."""

    def __init__(self, num_steps: int = NUM_STEPS) -> None:
        self._steps: deque[RecordedStep] = deque(maxlen=num_steps)
        self._events: deque[EngineEvent] = deque(maxlen=NUM_EVENTS)

    def on_step(self, stats: StepStats) -> None:
        self._steps.append(RecordedStep(stats, time.monotonic()))

    def on_ready(self, model: ModelInfo) -> None:
        self._note("ready", model.architecture)

    def on_death(self, reason: str) -> None:
        self._note("died", reason)

    def on_replay(self, num_requests: int) -> None:
        self._note("replay", f"{num_requests} requests go on where they were")

    def _note(self, name: str, detail: str) -> None:
        self._events.append(EngineEvent(time.monotonic(), name, detail))

    @property
    def steps(self) -> list[RecordedStep]:
        """A copy, the oldest first."""
        return list(self._steps)

    @property
    def events(self) -> list[EngineEvent]:
        return list(self._events)

    def pace(self, seconds: float, now: float) -> Pace:
        """Of the steps that ended in the last `seconds`. now: time.monotonic"""
        steps = [step.stats for step in self._during(now - seconds, math.inf)]
        return Pace(
            steps=len(steps) / seconds,
            output_tokens=sum(stats.num_output_tokens for stats in steps) / seconds,
            prompt_tokens=sum(stats.num_prompt_tokens for stats in steps) / seconds,
            num_draft_tokens=sum(stats.num_draft_tokens for stats in steps),
            num_accepted_drafts=sum(sum(stats.accepted_by_position) for stats in steps),
        )

    def between(self, start: float, end: float) -> Interval:
        """What ran then, as far as it is still known; of thousands of steps it looks at each so-manieth."""
        steps = self._during(start, end)
        seen = steps[:: len(steps) // MAX_STEPS_SEEN + 1]
        return Interval(
            num_steps=len(steps),
            max_num_running=max((step.stats.num_running for step in seen), default=0),
            max_kv_usage=max((kv_usage(step.stats) for step in seen), default=0.0),
            mean_num_seqs=sum(step.stats.num_seqs for step in seen) / max(len(seen), 1),
            longest=max(seen, key=lambda step: step.stats.seconds, default=None),
        )

    def _during(self, start: float, end: float) -> list[RecordedStep]:
        """The steps that were not over at `start` and had begun before `end`."""
        steps = self.steps
        first = bisect_right(steps, start, key=lambda step: step.ended_at)
        return steps[first : bisect_left(steps, end, key=lambda step: step.stats.started_at)]


def kv_usage(stats: StepStats) -> float:
    return stats.num_owned_blocks / max(stats.num_blocks, 1)
