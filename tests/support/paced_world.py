"""The scheduler's world with a target for the wait between tokens, and steps that take what a formula says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.scheduling.prompt_pacing import PromptPacing
from engine.scheduling.step_times import ContextCosts, StepTimes
from engine.scheduling.step_work import StepWork, count_work
from engine.types import Scheduled
from tests.support.scheduler_world import World

MEASURED = {rows: 0.005 + 0.0024 * rows for rows in (1, 2, 4, 8, 16, 32, 64, 96)}  # as the default model's on two cores
CONTEXTS = ContextCosts(pair=1.5e-7, kv_token=1.5e-7, logits=5e-4)


def true_seconds(work: StepWork) -> float:
    """Rows cost what was measured at the start, attention twice its first guess, and logits half of theirs."""
    rows = 0.005 + 0.0024 * work.num_tokens
    return rows + 3e-7 * work.num_pairs + 1e-7 * work.num_kv_tokens - 2.5e-4 * (work.num_tokens - work.num_logits)


def make_times() -> StepTimes:
    return StepTimes(MEASURED, CONTEXTS)


@dataclass
class PacedRun:
    """Steps a world and tells its pacing how long each took. waits: seconds of every step that some stream waited for;
    chunks: prompt tokens of each step"""

    world: World
    pacing: PromptPacing | None
    seconds_of: Callable[[StepWork], float] = true_seconds
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    waits: list[float] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world.scheduler.pacing = self.pacing

    def step(self) -> None:
        scheduler = self.world.scheduler
        planned: list[StepWork] = []
        schedule = scheduler.schedule

        def counted() -> list[Scheduled]:
            batch = schedule()
            planned.append(count_work(batch))
            return batch

        scheduler.schedule = counted
        try:
            self.world.step()
        finally:
            del scheduler.schedule
        (work,) = planned
        if not work.num_tokens:
            return
        seconds = self.seconds_of(work) * self.noise.choice([0.97, 1.0, 1.0, 1.0, 1.03])
        if work.num_tokens > work.num_prompt_tokens:
            self.waits.append(seconds)
        self.chunks.append(work.num_prompt_tokens)
        if self.pacing is not None:
            self.pacing.times.learn(work, seconds)
