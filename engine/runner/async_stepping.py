"""Asynchronous stepping: the next step is launched before the host knows the tokens of this one.

While the device computes a step, the host waits for its tokens, and while the host updates and schedules, the device
waits. What the next step needs of this one are the sampled tokens, which are on the device already: so it is queued
behind this one, prompt chunks and penalties included, and the host works in its shadow.

The scheduler does not know. It plans the next step when this one is over, as ever, and what it plans is then looked up
in the step that is in flight: a sequence that ended or was preempted meanwhile has cost its rows. Its keys and values
went to blocks that were its own when they were queued, before whatever the blocks' next owner writes there.

How much this gains is not measured yet.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.batch.device_inputs import to_device
from engine.batch.step_inputs import StepInputs
from engine.circuit_breaker import CircuitBreaker
from engine.faults import check_device
from engine.runner.decode_inputs import DecodeRun
from engine.runner.executor import Executor, InFlightStep, StepResult
from engine.runner.step_builder import StepBuilder
from engine.scheduling.foresight import foresee
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import StepClock
from engine.types import Scheduled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A step in flight that the scheduler has not planned yet. starts: of each item, the position of its first token

    run: where it is a step of a run of decoding steps, that run
    """

    step: InFlightStep
    items: list[Scheduled]
    starts: list[int]
    run: DecodeRun | None

    def places(self, batch: list[Scheduled]) -> list[int | None]:
        """Where each item of a plan is computed here; None: it is not."""
        known = {
            (item.seq, start, item.num_new_tokens, item.samples): place
            for place, (item, start) in enumerate(zip(self.items, self.starts, strict=True))
        }
        return [
            None
            if item.num_drafts or item.num_scored
            else known.get((item.seq, item.num_computed_tokens, item.num_new_tokens, item.samples))
            for item in batch
        ]


@dataclass(frozen=True, slots=True)
class Launched:
    """A planned step in flight: what was launched before it was planned, and what was launched for the rest of it.

    sources: of each item of the plan, the part that computes it and its place there; None: one part computes all, in
    the plan's order
    run: where the plan is a step of a run of decoding steps, that run
    """

    parts: list[InFlightStep]
    sources: list[tuple[int, int]] | None = None
    run: DecodeRun | None = None

    def tokens(self) -> Tensor:
        """What the plan's rows sampled, item after item. [num_sampled] int64, on the device"""
        if self.sources is None:
            return self.parts[0].tokens
        num_sampled = [part.inputs.seqs.num_sampled.tolist() for part in self.parts]
        firsts = [list(accumulate(numbers, initial=0)) for numbers in num_sampled]
        starts = list(accumulate((ends[-1] for ends in firsts), initial=0))
        rows = [
            starts[part] + row
            for part, place in self.sources
            for row in range(firsts[part][place], firsts[part][place + 1])
        ]
        tokens = torch.cat([part.tokens for part in self.parts])
        return tokens.index_select(0, to_device(np.array(rows, dtype=np.int64), tokens.device))

    def finish(self) -> StepResult:
        """Waits. One `Sampled` per item of the plan; no hidden states, since the next step has been launched."""
        results = [part.finish().sampled for part in self.parts]
        if self.sources is None:
            return StepResult(results[0])
        return StepResult([results[part][place] for part, place in self.sources])


class AsyncStepper:
    """Launches the step after the one that is running, and remembers it until the scheduler has planned it."""

    def __init__(self, executor: Executor, builder: StepBuilder, scheduler: Scheduler) -> None:
        self._executor, self._builder, self._scheduler = executor, builder, scheduler
        self._foreseen: Foreseen | None = None
        self.breaker = CircuitBreaker()

    def forget(self) -> None:
        """Lets go of what was launched. It still runs to its end on the device, and harms nothing."""
        if self._foreseen is not None:
            self._builder.failed(self._foreseen.items)
        self._foreseen = None

    def compute(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        """Launches what of the plan is not in flight yet, then the step that comes after it, and waits for the plan's
        tokens."""
        launched = self._complete(batch)
        if not self.breaker.is_open:
            self._foreseen = self._launch_next(batch, launched)
        self.breaker.step()
        clock.lap("forward")
        result = launched.finish()
        clock.lap("sample")
        return result

    def _complete(self, batch: list[Scheduled]) -> Launched:
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None:
            return Launched([self._launch(batch)])
        if foreseen.run is not None and foreseen.run.is_of(batch):
            return Launched([foreseen.step], run=foreseen.run)
        places = foreseen.places(batch)
        missing = [item for item, place in zip(batch, places, strict=True) if place is None]
        if len(missing) == len(batch):
            return Launched([self._launch(batch)])
        if not missing:
            if places == list(range(len(foreseen.items))):
                return Launched([foreseen.step])
            return Launched([foreseen.step], [(0, place) for place in places if place is not None])
        numbers = iter(range(len(missing)))
        sources = [(1, next(numbers)) if place is None else (0, place) for place in places]
        return Launched([foreseen.step, self._launch(missing)], sources)

    def _launch(self, batch: list[Scheduled]) -> InFlightStep:
        step = self._executor.launch(self._builder.build(batch))
        self._builder.launched()
        return step

    def _launch_next(self, batch: list[Scheduled], launched: Launched) -> Foreseen | None:
        plan: list[Scheduled] | None = None
        try:
            run = launched.run
            if run is not None and len(batch) == len(self._scheduler.running):
                plan = run.items
                inputs = run.advance()
                if inputs is not None:
                    return self._fly(plan, inputs, launched.tokens(), run)
            plan = foresee(self._scheduler, batch)
            if plan is None or any(self._builder.sampling.needs_host(item) for item in plan):
                return None
            inputs = self._builder.build(plan)
            is_decoding = all(item.num_new_tokens == 1 and item.source >= 0 for item in plan)
            run = DecodeRun(plan, inputs, kv=self._scheduler.kv, builder=self._builder) if is_decoding else None
            return self._fly(plan, inputs, launched.tokens(), run)
        except Exception as error:  # a step too early is no request's fault; it runs in its time, and fails there
            check_device(error)
            logger.exception("a step could not be launched ahead; every step waits for the one before it for a while")
            self._builder.failed(plan or batch)
            self.breaker.trip()
            return None

    def _fly(self, plan: list[Scheduled], inputs: StepInputs, newest: Tensor, run: DecodeRun | None) -> Foreseen:
        step = self._executor.launch(inputs, newest)
        self._builder.launched()
        starts = (inputs.seq_lens - np.diff(inputs.query_starts)).tolist()
        return Foreseen(step, plan, starts, run)
