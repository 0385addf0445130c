"""The engine: requests in, tokens out, one step at a time. Knows no processes and no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from engine.faults import EngineFaultError, check_device
from engine.kv_cache.block_pool import NULL_BLOCK
from engine.memory_errors import is_out_of_memory
from engine.runner.async_stepping import AsyncStepper
from engine.runner.executor import Executor, StepResult
from engine.runner.step_builder import StepBuilder
from engine.runner.step_recording import StepRecording
from engine.runner.trial import compute_one_token
from engine.scheduling.oom_split import drop_drafts, halve_chunks
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost, StepClock, StepPace, StepRecorder
from engine.speculation.speculator import Speculator
from engine.structured.grammar_states import GrammarStates
from engine.types import Request, Sampled, Scheduled, Sequence, StepOutput, StepStats

logger = logging.getLogger(__name__)

MAX_IDLE_WAIT = 0.02  # seconds, for which a step without anything to compute waits for a grammar

StepReport = tuple[list[StepOutput], list[str], StepStats]


class Engine:
    """Continuous batching: schedule, build the inputs, run them, update, propose.

    With `overlap`, a step is launched before the host has the tokens of the one before it
    (`engine.runner.async_stepping`), which needs a proposer that proposes nothing.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        speculator: Speculator,
        cost: ModelCost,
        *,
        pace: StepPace | None = None,
        overlap: bool = False,
        recording: StepRecording | None = None,
    ) -> None:
        """recording: of the step that runs, for `engine.replay`"""
        needs = speculator.proposer.needs
        assert not (overlap and needs.num_drafts), "drafts are made of tokens that the host must know"
        self.executor, self.scheduler, self.speculator = executor, scheduler, speculator
        self.builder = StepBuilder(
            scheduler.kv.block_size,
            executor.vocab_size,
            num_groups=scheduler.kv.num_groups,
            counts_on_device=executor.keeps_token_counts,
            shows_all_rows=needs.hidden == "all",
            typical=speculator.typical,
            grammars=speculator.grammars,
        )
        self.grammars = speculator.grammars  # of the requests; None: they may have none
        if self.grammars is not None:
            scheduler.is_ready = self.grammars.is_ready
        speculator.drafts_forced = not overlap
        self.cost, self._pace = cost, pace or StepPace()
        self.on_batch: Callable[[list[Scheduled]], None] = lambda batch: None  # told what is about to run
        self.recording = recording
        self._stepper = AsyncStepper(executor, self.builder, scheduler) if overlap else None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError where it can never run."""
        token_ids = request.prompt_token_ids + request.output_token_ids
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest >= self.executor.vocab_size:
            raise ValueError(
                f"token ids {lowest} to {highest} reach beyond the vocabulary of {self.executor.vocab_size}"
            )
        seq = Sequence(request, token_ids, added_at=time.monotonic())
        if request.params.grammar is not None and self.grammars is None:
            raise ValueError("this engine was made without grammars: answers cannot be made to follow one")
        self.scheduler.add(seq)
        if self.grammars is not None:
            self.grammars.open(seq)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    @property
    def degraded_modes(self) -> list[str]:
        """Names of the optional parts that steps leave out for now, because they failed."""
        modes = {
            "token_budget": self.scheduler.is_budget_lowered,
            "run_ahead": self._stepper is not None and self._stepper.breaker.is_open,
            "cuda_graphs": self.executor.lacks_graphs,
            "speculation": self.speculator.is_off,
        }
        return [name for name, is_degraded in modes.items() if is_degraded]

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Runs one step. Returns its outputs, the ids of the requests that left the queue in it, and its numbers.

        A request whose computation fails ends alone, with the finish reason "error"; the others go on. Raises
        EngineFaultError where it is not a request's fault: then no later step would be any better.
        """
        recorder = StepRecorder(self.scheduler, self.cost)
        refused = [] if self.grammars is None else self._end_impossible(self.grammars)
        batch = self.scheduler.schedule()
        started = _mark_started(batch)
        recorder.clock.lap("schedule")
        if not batch:  # after aborts there may be nothing to do; the numbers then say that the memory is free
            self._forget_launched()
            if self.grammars is not None and self.has_work:  # all wait until they are compiled
                self.grammars.wait(MAX_IDLE_WAIT)
            recorder.plan(batch)
            return refused, [], recorder.stats([], [], self.degraded_modes)
        self.on_batch(batch)
        result = self._compute(batch, recorder.clock)
        work = recorder.plan(batch)
        pacing = self.scheduler.pacing
        predicted = 0.0 if pacing is None else pacing.times.seconds(work)
        places = self.speculator.places_of(batch)
        if self.grammars is not None:
            self.grammars.follow(batch, result.sampled)
        outputs = refused + self.scheduler.update(batch, result.sampled)
        recorder.clock.lap("update")
        self.speculator.propose(batch, result.sampled, result.hidden, places=places)
        if not self.has_work:
            self._forget_launched()
        recorder.clock.lap("propose")
        stats = recorder.stats(
            result.sampled, outputs, self.degraded_modes, self.speculator.outcome, predicted=predicted
        )
        self._pace.learn(stats)
        self.speculator.learn(stats)
        if pacing is not None and stats.flops:  # 0: parts of it failed, and the time is of something else
            pacing.times.learn(work, stats.seconds)
        return outputs, started, stats

    def _end_impossible(self, grammars: GrammarStates) -> list[StepOutput]:
        """Ends the requests whose grammars cannot be followed."""
        outputs = []
        for seq, reason in grammars.take_failed():
            request_id = seq.request.request_id
            if self.scheduler.abort(request_id) is not None:
                message = f"the grammar of request {request_id} cannot be followed: {reason}"
                outputs.append(
                    StepOutput(request_id=request_id, finish_reason="error", error=message, error_kind="constraints")
                )
        return outputs

    def _compute(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        """Forward and sample. Where that fails, once more for each item alone, to find whose fault it is; where memory
        runs out, in smaller steps: prompt tokens leave the batch, and are computed later.

        Running an item twice is harmless: it writes the same keys and values into the same slots.
        """
        try:
            result = self._run_recorded(batch, clock)
            self.scheduler.note_quiet_step()
            return result
        except Exception as error:
            check_device(error)
            if not is_out_of_memory(error):
                logger.exception("a step of %d requests failed; running each alone", len(batch))
                self._give_up(batch)
                return self._compute_each(batch, clock)
            logger.warning("a step of %d tokens ran out of memory", _num_tokens(batch))
        return self._compute_smaller(batch, clock)  # outside of the handler: the error holds what the step allocated

    def _compute_smaller(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        """Once more what ran out of memory, with less: fewer prompt tokens, then no drafts, then fewer requests."""
        self._give_up(batch)
        self.executor.release_memory()
        if halve_chunks(batch) or drop_drafts(batch):
            self.scheduler.lower_budget(_num_tokens(batch))
            return self._compute(batch, clock)
        if len(batch) > 1:
            middle = len(batch) // 2
            return _join([self._compute(batch[:middle], clock), self._compute(batch[middle:], clock)])
        return StepResult(
            [_failure(batch[0], "the device has not enough memory for a step of it; lower kv_cache.memory")]
        )

    def _compute_each(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        """Runs each item in a step of its own. Raises EngineFaultError if none of several could be computed."""
        parts: list[StepResult] = []
        num_failures = 0
        for item in batch:
            self.on_batch([item])  # should the process die now, it is known for whom
            try:
                parts.append(self._run_recorded([item], clock))
                continue
            except Exception as error:
                check_device(error)
                if not is_out_of_memory(error):
                    num_failures += 1
                    logger.exception("request %s failed alone", item.seq.request.request_id)
                    self.builder.failed([item])
                    parts.append(StepResult([_failure(item, type(error).__name__)]))
                    self.on_batch(batch)
                    self._probe(error)
                    continue
                logger.warning("request %s ran out of memory alone", item.seq.request.request_id)
            parts.append(self._compute_smaller([item], clock))
        if num_failures == len(batch) > 1:
            raise EngineFaultError(f"each of {num_failures} requests failed, alone too: it is none of theirs")
        return _join(parts)

    def _probe(self, failure: Exception) -> None:
        """Runs one token of no request through the model. Raises EngineFaultError if even that fails."""
        try:
            compute_one_token(self.executor, self.builder, block=NULL_BLOCK)
        except Exception as error:
            logger.exception("a single token could not be computed either")
            raise EngineFaultError(
                f"no step succeeds any more, the last with {type(error).__name__}: {error}"
            ) from failure

    def _run(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        if self._stepper is not None:
            return self._stepper.compute(batch, clock)
        step = self.executor.launch(self.builder.build(batch))
        self.builder.launched()
        clock.lap("forward")
        result = step.finish()
        clock.lap("sample")
        return result

    def _run_recorded(self, batch: list[Scheduled], clock: StepClock) -> StepResult:
        if self.recording is None:
            return self._run(batch, clock)
        self.recording.begin(batch, self.builder)
        try:
            result = self._run(batch, clock)
        except Exception:
            self.recording.keep()
            raise
        self.recording.end()
        return result

    def _give_up(self, batch: list[Scheduled]) -> None:
        """Ends a step of these items that failed, and the in-flight step behind it."""
        self._forget_launched()
        self.builder.failed(batch)

    def _forget_launched(self) -> None:
        if self._stepper is not None:
            self._stepper.forget()


def _mark_started(batch: list[Scheduled]) -> list[str]:
    now, started = time.monotonic(), []
    for item in batch:
        if item.seq.first_scheduled_at is None:
            item.seq.first_scheduled_at = now
            started.append(item.seq.request.request_id)
    return started


def _num_tokens(batch: list[Scheduled]) -> int:
    return sum(item.num_new_tokens for item in batch)


def _join(parts: list[StepResult]) -> StepResult:
    """The result of a step computed in parts. It has no hidden states, since a part overwrites those before."""
    return StepResult([sampled for part in parts for sampled in part.sampled])


def _failure(item: Scheduled, reason: str) -> Sampled:
    return Sampled([], error=f"request {item.seq.request.request_id} failed in the engine: {reason}")
