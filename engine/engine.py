"""The engine: requests in, tokens out, one step at a time. Knows no processes and no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.model_runner import ModelRunner
from engine.proposers.proposer import Proposer
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.step_stats import ModelCost, StepClock, StepRecorder
from engine.types import Request, Sampled, Scheduled, Sequence, StepOutput, StepStats

logger = logging.getLogger(__name__)

StepResult = tuple[list[StepOutput], list[str], StepStats]


class Engine:
    """Continuous batching in five lines: schedule, forward, sample, update, propose."""

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, sampler: Sampler, proposer: Proposer, cost: ModelCost
    ) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.sampler, self.proposer = sampler, proposer
        self.cost = cost
        self.on_batch: Callable[[list[Scheduled]], None] = lambda batch: None  # told what is about to run

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError where it can never run."""
        token_ids = request.prompt_token_ids + request.output_token_ids
        self.scheduler.add(Sequence(request, token_ids, added_at=time.monotonic()))

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Runs one step. Returns its outputs, the ids of the requests that left the queue in it, and its numbers.

        A request whose computation fails ends alone, with the finish reason "error"; the others go on.
        """
        recorder = StepRecorder(self.scheduler, self.cost)
        batch = self.scheduler.schedule()
        started = _mark_started(batch)
        recorder.plan(batch)
        recorder.clock.lap("schedule")
        if not batch:  # aborts left nothing to do; the numbers say that the memory is free
            return [], [], recorder.stats([])
        self.on_batch(batch)
        hidden, sampled = self._compute(batch, recorder.clock)
        self.runner.keep_accepted(batch, sampled)
        outputs = self.scheduler.update(batch, sampled)
        recorder.clock.lap("update")
        self._propose(batch, sampled, hidden)
        recorder.clock.lap("propose")
        return outputs, started, recorder.stats(sampled)

    def _compute(self, batch: list[Scheduled], clock: StepClock) -> tuple[Tensor, list[Sampled]]:
        """Forward and sample; where that fails, once more for each item alone, to find whose fault it is.

        Running an item twice is harmless: it writes the same keys and values into the same slots.
        """
        try:
            return self._forward_and_sample(batch, clock)
        except Exception:
            logger.exception("a step of %d requests failed; running each alone", len(batch))
        parts = [self._compute_alone(item, clock) for item in batch]
        return torch.cat([hidden for hidden, _ in parts]), [sampled for _, sampled in parts]

    def _compute_alone(self, item: Scheduled, clock: StepClock) -> tuple[Tensor, Sampled]:
        self.on_batch([item])  # should the process die now, it is known for whom
        try:
            hidden, sampled = self._forward_and_sample([item], clock)
        except Exception as error:
            request_id = item.seq.request.request_id
            logger.exception("request %s failed alone", request_id)
            no_hidden = torch.zeros(item.num_logits, self.runner.model.hidden_size, device=self.runner.device)
            return no_hidden, Sampled([], error=f"request {request_id} failed in the engine: {type(error).__name__}")
        return hidden, sampled[0]

    def _forward_and_sample(self, batch: list[Scheduled], clock: StepClock) -> tuple[Tensor, list[Sampled]]:
        hidden, logits = self.runner.forward(batch)
        clock.lap("forward")
        sampled = self.sampler(logits, batch)
        clock.lap("sample")
        return hidden, sampled

    def _propose(self, batch: list[Scheduled], sampled: list[Sampled], hidden: Tensor) -> None:
        """Hands the proposer what goes on sampling, with the hidden state that each newest token came from."""
        going_on: list[Scheduled] = []
        rows: list[int] = []
        start = 0
        for item, result in zip(batch, sampled, strict=True):
            if result.token_ids and not item.seq.finish_reason:
                going_on.append(item)
                rows.append(start + item.num_scored + (result.accepted[-1] + 1 if result.accepted else 0))
            start += item.num_logits
        if not going_on:
            return
        try:
            self.proposer.propose(going_on, hidden[rows])
        except Exception:  # a guess that could not be made costs time, never the request
            logger.exception("the proposer failed; going on without drafts")
            for item in going_on:
                item.seq.draft_token_ids, item.seq.draft_parents = [], []


def _mark_started(batch: list[Scheduled]) -> list[str]:
    now, started = time.monotonic(), []
    for item in batch:
        if item.seq.first_scheduled_at is None:
            item.seq.first_scheduled_at = now
            started.append(item.seq.request.request_id)
    return started
