"""The next step, launched before the host knows the tokens of this one.

While the device computes a step, the host waits for its tokens, and while the host updates and schedules, the device
waits. Where every sequence is going to decode one token next, that next step needs nothing but the sampled tokens,
which are on the device already: so it is queued behind this one, and the host works in its shadow.

The scheduler does not know. It plans the next step when this one is over, as ever, and what it plans is then looked up
among what is running: a sequence that ended or was preempted meanwhile has cost a row. Its keys and values went to a
block that was its own when they were queued, before whatever the block's next owner writes there.

How much this gains is not measured yet.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.forward_batch import Ahead
from engine.batch.transfer import to_device
from engine.circuit_breaker import CircuitBreaker
from engine.faults import check_device
from engine.runner.decode_inputs import DecodeRun, make_room
from engine.runner.model_runner import ModelRunner
from engine.sampling.logit_processors import needs_token_history
from engine.sampling.output import Pending
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import StepClock
from engine.types import Sampled, Scheduled, Sequence

logger = logging.getLogger(__name__)


class LaunchingSampler(Protocol):
    """What the engine asks of a sampler."""

    def launch(self, logits: Tensor, batch: list[Scheduled], positions: Ints | None = None) -> Pending:
        """As `engine.sampling.sampler.TokenSampler` says."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on the device that the scheduler has not planned yet, and the run that it is a step of."""

    pending: Pending
    run: DecodeRun

    def rows(self) -> dict[Sequence, int]:
        return {seq: row for row, seq in enumerate(self.run.seqs)}


@dataclass(frozen=True, slots=True)
class Launched:
    """A planned step on the device: the part that was launched ahead, and what was launched for the rest of the plan.

    sources: of each item of the plan, the part that computes it and its row there. A part has one row per item. None:
    all are computed by one part, in the plan's order
    run: where the plan is a step of a run, that run
    """

    parts: list[Pending]
    sources: list[tuple[int, int]] | None = None
    run: DecodeRun | None = None

    def tokens(self) -> Tensor:
        """What was sampled for the items, all of which sample one token. [num_items] int64, on the device"""
        tokens = [part.tokens for part in self.parts]
        if self.sources is None:
            return tokens[0]
        starts = list(accumulate(map(len, tokens), initial=0))
        return _select(torch.cat(tokens), [starts[part] + row for part, row in self.sources])

    def finish(self) -> list[Sampled]:
        """Waits. One `Sampled` per item."""
        results = [part.finish() for part in self.parts]
        return results[0] if self.sources is None else [results[part][row] for part, row in self.sources]


class RunAhead:
    """Launches the step after the one that is running, and remembers it until the scheduler has planned it."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, sampler: LaunchingSampler) -> None:
        self._runner, self._scheduler, self._sampler = runner, scheduler, sampler
        self._flight: Flight | None = None
        self.breaker = CircuitBreaker()

    def forget(self) -> None:
        """Lets go of what was launched. It still runs to its end on the device, and harms nothing."""
        self._flight = None

    def compute(self, batch: list[Scheduled], clock: StepClock) -> list[Sampled]:
        """Launches what of the plan is not under way yet, then the step that comes after it, and waits for the plan's
        tokens. One `Sampled` per item."""
        launched = self._complete(batch)
        if not self.breaker.is_open:
            self._flight = self._launch_next(batch, launched)
        self.breaker.step()
        clock.lap("forward")
        sampled = launched.finish()
        clock.lap("sample")
        return sampled

    def _complete(self, batch: list[Scheduled]) -> Launched:
        flight, self._flight = self._flight, None
        if flight is None:
            return Launched([self._launch(batch)])
        if flight.run.is_of(batch):
            return Launched([flight.pending], run=flight.run)
        known = flight.rows()
        rows = [known.get(item.seq) for item in batch]
        missing = [item for item, row in zip(batch, rows, strict=True) if row is None]
        if len(missing) == len(batch):
            return Launched([self._launch(batch)])
        for item, row in zip(batch, rows, strict=True):
            assert row is None or (item.num_new_tokens == 1 and not item.num_drafts), "it was not computed for this"
        if not missing:
            return Launched([flight.pending], [(0, row) for row in rows if row is not None])
        places = count()
        sources = [(1, next(places)) if row is None else (0, row) for row in rows]
        return Launched([flight.pending, self._launch(missing)], sources)

    def _launch(self, batch: list[Scheduled]) -> Pending:
        return self._sampler.launch(self._runner.forward(batch)[1], batch)

    def _launch_next(self, batch: list[Scheduled], launched: Launched) -> Flight | None:
        run = launched.run
        try:
            if run is not None and len(batch) == len(self._scheduler.running) and run.advance():
                return self._fly(run, launched.tokens())
            if not self._is_next_known(batch):
                return None
            going_on = [row for row, item in enumerate(batch) if not self._ends(item)]
            run = self._start_run([batch[row].seq for row in going_on])
            return None if run is None else self._fly(run, _select(launched.tokens(), going_on))
        except Exception as error:  # a step too early is no request's fault; it runs in its time, and fails there
            check_device(error)
            logger.exception("a step could not be launched ahead; every step waits for the one before it for a while")
            self.breaker.trip()
            return None

    def _start_run(self, seqs: list[Sequence]) -> DecodeRun | None:
        scheduler = self._scheduler
        if not seqs or not make_room(seqs, scheduler.kv):
            return None
        return DecodeRun(seqs, kv=scheduler.kv, tables=self._runner.tables)

    def _fly(self, run: DecodeRun, tokens: Tensor) -> Flight:
        _, logits = self._runner.forward(run.items, Ahead(run.numbers, tokens))
        return Flight(self._sampler.launch(logits, run.items, run.sampled_positions), run)

    def _is_next_known(self, batch: list[Scheduled]) -> bool:
        """Whether each running sequence will decode one token, chosen without regard to the text before it.

        Others may be admitted too; those are computed beside what was launched, which is worth it only where the
        scheduler has just found no room for them.
        """
        has_all = len(batch) == len(self._scheduler.running)
        is_steady = not len(self._scheduler.waiting) or all(item.num_new_tokens == 1 for item in batch)
        return (
            has_all
            and is_steady
            and all(item.samples and not item.num_drafts and not needs_token_history(item) for item in batch)
        )

    @staticmethod
    def _ends(item: Scheduled) -> bool:
        """Whether the token that is being sampled is the sequence's last, whatever it is."""
        return item.seq.num_tokens + 1 >= item.seq.max_num_tokens


def _select(tokens: Tensor, rows: list[int]) -> Tensor:
    """Some of the tokens, in the order of `rows`; without a wait for what the device is computing."""
    if rows == list(range(len(tokens))):
        return tokens
    return tokens.index_select(0, to_device(np.array(rows, dtype=np.int64), tokens.device))
