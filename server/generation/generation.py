"""From a validated request to a stream of deltas: runs its choices, reads them as one, counts, ends exactly once."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from engine.client.client import EngineClient, EngineError, OutputStream
from engine.types import Request, RequestTiming, StepOutput
from server.errors import ApiError
from server.generation.active_requests import ActiveRequests
from server.generation.admission import Admission, Place
from server.generation.choice import Choice, ChoiceReader, Delta
from server.parsing.answer_shape import PLAIN_SHAPE, AnswerShape
from server.protocol.responses import CompletionDetails, PromptDetails, Timing, Usage
from server.telemetry.request_record import RequestRecord
from server.telemetry.request_timeline import Admitted, Ahead
from server.telemetry.token_counts import TokenCounts
from server.text.tokenizer import Tokenizer

ENGINE_ERROR_STATUS = {"constraints": 400, "request": 500, "quarantined": 500, "engine_failed": 503, "stopped": 503}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks for, after all checks.

    tenant: whose it is. deadline: in the event loop's time, seconds.
    choices_per_prompt: choice i belongs to prompt i // choices_per_prompt. shape: how `AnswerReader` takes it apart.
    is_background: nobody waits for it, so the queue's limits are not for it
    """

    response_id: str
    request_id: str
    tenant: str
    model: str
    created: int
    fingerprint: str
    choices: list[Choice]
    choices_per_prompt: int
    deadline: float | None
    shape: AnswerShape = PLAIN_SHAPE
    is_background: bool = False


class Generation:
    """One HTTP request for text while it runs. `deltas` may be read once; leaving it early aborts the engine's work."""

    def __init__(
        self,
        job: Job,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        admission: Admission,
        active_requests: ActiveRequests,
        record: RequestRecord,
    ) -> None:
        self.job = job
        self.readers = [ChoiceReader(choice, tokenizer) for choice in job.choices]
        self._open = {reader.choice.request.request_id: reader for reader in self.readers}  # have not ended
        self._engine = engine
        self._admission = admission
        self._active_requests = active_requests
        self._record = record
        self._num_restarts_before = engine.num_restarts

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """The pieces of all choices as they come, those of a step together; the last of each has a finish reason.

        Nothing is read ahead of the consumer, so a slow reader holds the engine's numbers, not text. Raises ApiError if
        the queue has no room for it, or if a choice cannot be finished: that ends all of them, and nothing follows.
        """
        ids = (self.job.response_id, self.job.request_id)
        num_tokens = sum(len(choice.prompt.token_ids) for choice in self.job.choices)
        admit = self._admission.admit_background if self.job.is_background else self._admission.admit
        has_begun = False
        with (
            admit(len(self.job.choices), num_tokens, self.job.tenant) as place,
            self._record.running(self, place.ahead),
            self._in_engine(place) as outputs,
            self._active_requests.register(self.job.tenant, ids, self.job.deadline, outputs),
        ):
            try:
                while self._open:
                    deltas = await self._next_deltas(outputs, place)
                    if not has_begun:
                        self._record.first_token()
                        has_begun = True
                    if not self._open:  # a client that leaves now has had everything
                        self._record.outcome = self._outcome()
                    yield deltas
            finally:
                place.charge_output(sum(reader.num_tokens for reader in self.readers))

    @contextmanager
    def _in_engine(self, place: Place) -> Iterator[OutputStream]:
        """The choices run in the engine, and none of them does after it."""
        choices = self.job.choices
        try:
            with ExitStack() as ends, self._engine.generate([choice.request for choice in choices]) as outputs:
                for choice in choices:
                    place.hand_over(len(choice.prompt.token_ids))
                ends.callback(self._end_open, place)
                yield outputs
        except EngineError as error:
            raise self._failure(str(error), error.kind) from error

    def _end_open(self, place: Place) -> None:
        for _ in self._open:
            place.end()

    async def _next_deltas(self, outputs: OutputStream, place: Place) -> list[Delta]:
        """What the engine's next outputs complete: at least one delta. At the deadline, the last of every choice."""
        deltas: list[Delta] = []
        while not deltas:
            try:
                batch = await outputs.take(len(self._open))  # a step's, however many wait behind them
            except TimeoutError:
                return self._expire(outputs, place)
            for output in batch:
                reader = self._open.get(output.request_id)
                if reader is None:  # a stop string has ended it before
                    continue
                delta = self._read(reader, output)
                if delta is not None:
                    deltas.append(delta)
                if reader.finish_reason is not None:
                    self._end(reader, outputs, place)
        return deltas

    def _read(self, reader: ChoiceReader, output: StepOutput) -> Delta | None:
        num_before, last_at = reader.num_tokens, reader.last_tokens_at
        delta = reader.take(output)
        self._record.tokens(reader.num_tokens - num_before, last_at, reader.last_tokens_at)
        return delta

    def _expire(self, outputs: OutputStream, place: Place) -> list[Delta]:
        if not any(reader.num_tokens or reader.finish_reason for reader in self.readers):
            raise ApiError(408, self._late())
        late = list(self._open.values())
        deltas = [reader.expire() for reader in late]
        for reader in late:
            self._end(reader, outputs, place)
        return deltas

    def _end(self, reader: ChoiceReader, outputs: OutputStream, place: Place) -> None:
        request_id = reader.choice.request.request_id
        outputs.leave(request_id)
        del self._open[request_id]
        timing = reader.timing
        place.end(None if timing is None or reader.has_expired else timing.prefill + timing.decode)

    def _failure(self, message: str, kind: str) -> ApiError:
        message = f"{message} (request {self.job.request_id})"
        return ApiError(ENGINE_ERROR_STATUS[kind], message, code=f"engine_{kind}")

    def _late(self) -> str:
        seconds = time.monotonic() - self._record.started_at
        return (
            f"no token came within the deadline, {seconds:.3f} s after arrival; {self._engine.num_waiting} requests "
            "wait for the engine; try again later, or with a longer timeout"
        )

    def _outcome(self) -> str:
        """The least happy of the choices' ends."""
        if any(reader.has_expired for reader in self.readers):
            return "timeout"
        return "length" if any(reader.finish_reason == "length" for reader in self.readers) else "stop"

    def counts(self) -> TokenCounts:
        """The usage so far, each prompt counted once."""
        firsts = self.readers[:: self.job.choices_per_prompt]
        timings = [reader.timing for reader in self.readers if reader.timing is not None]
        num_accepted = sum(reader.num_accepted_drafts for reader in self.readers)
        return TokenCounts(
            num_prompt_tokens=sum(len(reader.choice.prompt.token_ids) for reader in firsts),
            num_cached_tokens=sum(reader.num_cached_tokens for reader in firsts),
            num_output_tokens=sum(reader.num_tokens for reader in self.readers),
            num_accepted_drafts=num_accepted,
            num_rejected_drafts=max(sum(timing.num_drafts for timing in timings) - num_accepted, 0),
        )

    def usage(self, *, num_output_tokens: int | None = None) -> Usage:
        """num_output_tokens: those that a reader has had, if not all so far"""
        counts = self.counts()
        num_output = counts.num_output_tokens if num_output_tokens is None else num_output_tokens
        return Usage(
            counts.num_prompt_tokens,
            num_output,
            counts.num_prompt_tokens + num_output,
            PromptDetails(counts.num_cached_tokens),
            CompletionDetails(min(counts.num_accepted_drafts, num_output), counts.num_rejected_drafts),
        )

    @property
    def choices_per_prompt(self) -> int:
        return self.job.choices_per_prompt

    @property
    def max_tokens(self) -> int:
        """Of each choice, at most."""
        return self.job.choices[0].request.params.max_tokens

    def admitted(self, ahead: Ahead) -> Admitted:
        first = self.job.choices[0]
        return Admitted(
            response_id=self.job.response_id,
            cache_salt=first.request.cache_salt,
            num_prompt_tokens=self.counts().num_prompt_tokens,
            num_choices=len(self.job.choices),
            ahead=ahead,
            needs_all=_what_needs_all(first.request),
        )

    @property
    def prompt_token_ids(self) -> list[int]:
        """Of the first prompt."""
        return self.job.choices[0].prompt.token_ids

    @property
    def num_restarts(self) -> int:
        """Of the engine, since it was made."""
        return self._engine.num_restarts - self._num_restarts_before

    def first_timing(self) -> RequestTiming | None:
        """Of the choice that had the first token."""
        begun = [reader for reader in self.readers if reader.first_tokens_at is not None]
        return min(begun or self.readers, key=lambda reader: reader.first_tokens_at or 0.0).timing

    def engine_timing(self) -> RequestTiming | None:
        """Of the choice that ended last."""
        return self.last_reader.timing

    @property
    def last_reader(self) -> ChoiceReader:
        return max(self.readers, key=lambda reader: reader.ended_at)

    def timing(self) -> Timing:
        counts, last = self.counts(), self.last_reader
        timings = [reader.timing for reader in self.readers if reader.timing is not None]
        total = last.ended_at - self._record.started_at
        queued, prefill, decode = last.seconds_in_engine()
        decode = max(min(decode, total - queued - prefill), 0.0)
        return Timing(
            total=total,
            server=total - queued - prefill - decode,
            queued=queued,
            prefill=prefill,
            decode=decode,
            prefill_chunks=sum(timing.num_prefill_chunks for timing in timings),
            prefill_tokens=counts.num_prompt_tokens - counts.num_cached_tokens,
            cached_tokens=counts.num_cached_tokens,
            preemptions=sum(timing.num_preemptions for timing in timings),
            drafts_proposed=counts.num_accepted_drafts + counts.num_rejected_drafts,
            drafts_accepted=counts.num_accepted_drafts,
            restarts_survived=self.num_restarts,
        )


def _what_needs_all(request: Request) -> str:
    """As of `Admitted`."""
    if request.params.prompt_logprobs is not None:
        return "prompt_logprobs need"
    return "the mean of all hidden states needs" if request.pooling == "mean" else ""
