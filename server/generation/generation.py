"""From a validated request to a stream of deltas: runs its choices, merges them, counts, and ends exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from engine.client.client import EngineClient, EngineError
from engine.types import RequestTiming, StepOutput
from server.errors import ApiError
from server.generation.active_requests import ActiveRequest, ActiveRequests
from server.generation.admission import Admission, Place
from server.generation.choice import Choice, ChoiceReader, Delta
from server.protocol.responses import CompletionDetails, PromptDetails, Timing, Usage
from server.telemetry.request_record import RequestRecord
from server.telemetry.token_counts import TokenCounts
from server.text.tokenizer import Tokenizer

ENGINE_ERROR_STATUS = {"constraints": 400, "request": 500, "quarantined": 500, "engine_failed": 503, "stopped": 503}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks for, after all checks.

    tenant: whose it is. deadline: in the event loop's time, seconds.
    choices_per_prompt: choice i belongs to prompt i // choices_per_prompt.
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
        self._engine = engine
        self._admission = admission
        self._active_requests = active_requests
        self._record = record
        self._num_restarts_before = engine.num_restarts

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The pieces of all choices as they come; each choice ends with exactly one that has a finish reason.

        Raises ApiError if the queue has no room for it, or if it cannot be finished; nothing follows then.
        """
        ids = (self.job.response_id, self.job.request_id)
        num_delivered = num_ended = 0
        num_tokens = sum(len(choice.prompt.token_ids) for choice in self.job.choices)
        with (
            self._admission.admit(len(self.job.choices), num_tokens) as place,
            self._active_requests.register(self.job.tenant, ids, self.job.deadline) as active,
            self._record.running(self),
        ):
            streams = [self._read_choice(reader, active, place) for reader in self.readers]
            async with aclosing(merge(streams)) as merged:
                async for delta in merged:
                    has_expired = self.readers[delta.index].has_expired
                    if has_expired and num_delivered == 0 and not delta.token_ids:
                        raise ApiError(408, self._late())
                    num_delivered += 1
                    if num_delivered == 1:
                        self._record.first_token()
                    num_ended += delta.finish_reason is not None
                    if num_ended == len(self.readers):  # a client that leaves now has had everything
                        self._record.outcome = self._outcome()
                    yield delta

    async def _read_choice(
        self, reader: ChoiceReader, active: ActiveRequest, place: Place
    ) -> AsyncGenerator[Delta, None]:
        try:
            async with aclosing(self._engine.generate(reader.choice.request)) as outputs:
                place.hand_over(len(reader.choice.prompt.token_ids))
                while reader.finish_reason is None:
                    delta = await self._read_delta(reader, active, outputs)
                    if delta is not None:
                        yield delta
        finally:
            place.end()

    async def _read_delta(
        self, reader: ChoiceReader, active: ActiveRequest, outputs: AsyncGenerator[StepOutput, None]
    ) -> Delta | None:
        """What the engine's next output completes."""
        try:
            output = await active.next(outputs)
        except TimeoutError:
            return reader.expire()
        except EngineError as error:
            raise self._failure(str(error), error.kind) from error
        if output.finish_reason == "error":
            raise self._failure(output.error or "the engine could not finish the request", "request")
        num_before, last_at = reader.num_tokens, reader.last_tokens_at
        delta = reader.take(output)
        self._record.tokens(reader.num_tokens - num_before, last_at, reader.last_tokens_at)
        return delta

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
            restarts_survived=self._engine.num_restarts - self._num_restarts_before,
        )


async def merge(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All items of all streams as they come. A failure of one ends all; so does leaving.

    No stream is read ahead of the consumer by more than an item, so a slow reader holds the engine's numbers, not text.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    pending: dict[asyncio.Future[Delta], AsyncGenerator[Delta, None]] = {
        asyncio.ensure_future(anext(stream)): stream for stream in streams
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ready: list[Delta] = []
            for future in done:
                stream = pending.pop(future)
                if isinstance(future.exception(), StopAsyncIteration):
                    continue
                ready.append(future.result())
                pending[asyncio.ensure_future(anext(stream))] = stream
            for delta in sorted(ready, key=lambda delta: delta.index):
                yield delta
    finally:
        await _close(pending, streams)


async def _close(futures: Iterable[asyncio.Future[Delta]], streams: Iterable[AsyncGenerator[Delta, None]]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
