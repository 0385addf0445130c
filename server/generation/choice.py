"""One choice of an answer: its request to the engine, and the reader that turns outputs into deltas of text."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass
from io import StringIO

import msgspec

from engine.types import Request, RequestTiming, StepOutput, TokenLogprobs
from server.generation.prompts import Prompt
from server.protocol.responses import FinishReason
from server.text.detokenizer import Detokenizer, TextOptions
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice of a request: what the engine is asked for, and how its tokens become text."""

    index: int
    prompt: Prompt
    request: Request
    text: TextOptions
    asked_stop_ids: frozenset[int]  # stop tokens that the client named, so that it may be told which one it was
    scores_only: bool = False  # of the prompt its log-probabilities or its pooled states are wanted, and no token


class Delta(msgspec.Struct, kw_only=True):
    """A piece of a choice. The last one of a choice has a finish reason."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    offsets: list[int] = []  # in characters: where each token begins in the choice's text
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    specials: list[tuple[int, str]] = []  # skipped special tokens that were asked for: their places, as `offsets`
    is_first: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    pooled: bytes | None = None  # as of `StepOutput`


class DeltaCollector:
    """All deltas of a choice, to be answered as one. Linear: no text is copied again for what comes after it."""

    def __init__(self, index: int) -> None:
        self._text = StringIO()
        self._rest = Delta(index=index, is_first=True)

    def add(self, delta: Delta) -> None:
        """Adds a delta; they must be added in the order in which they came."""
        self._text.write(delta.text)
        self._rest.token_ids += delta.token_ids
        self._rest.offsets += delta.offsets
        self._rest.logprobs += delta.logprobs
        self._rest.prompt_logprobs += delta.prompt_logprobs
        self._rest.specials += delta.specials
        self._rest.finish_reason, self._rest.stop_reason = delta.finish_reason, delta.stop_reason
        self._rest.pooled = delta.pooled or self._rest.pooled

    def collected(self) -> Delta:
        return msgspec.structs.replace(self._rest, text=self._text.getvalue())


class ChoiceReader:
    """Turns the engine's outputs for one choice into deltas, and counts.

    Tokens that give no text yet wait for the next delta, so that a chunk is never empty before the end, and so do those
    of which all text is held back: where a stop string cuts them off, they begin at the end of the text.
    """

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._num_multiple_tokens = 0  # tokens that came on top of the first of their step: drafts that were right
        self._told_timing: RequestTiming | None = None  # the engine's last word on it
        self._has_engine_ended = False
        self.finish_reason: FinishReason | None = None
        self.has_expired = False  # its deadline ended it
        self.started_at = time.monotonic()
        self.ended_at = self.started_at
        self.first_tokens_at: float | None = None
        self.last_tokens_at: float | None = None
        self._detokenizer = Detokenizer(tokenizer, choice.text)
        self._next = Delta(index=choice.index, is_first=True)

    def take(self, output: StepOutput) -> Delta | None:
        """The next delta, if the output completes one. After a finish reason, leave the engine's stream."""
        assert output.finish_reason != "error"
        self._told_timing = output.timing or self._told_timing
        self._has_engine_ended = output.finish_reason is not None
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        delta = self._next
        delta.prompt_logprobs += output.prompt_logprobs or []
        delta.pooled = output.pooled
        if not self.choice.scores_only:
            self._take_tokens(output, delta)
        if output.finish_reason is not None and self.finish_reason is None:
            self._finish(delta, output.finish_reason, self._stop_reason(output))
        if not delta.text and delta.finish_reason is None:
            return None
        delta.specials += self._detokenizer.take_specials()
        self._next = self._cut_held_tokens(delta)
        return delta

    def expire(self) -> Delta:
        """The last delta of a choice whose deadline passed: all that was held back."""
        delta = self._next
        self._finish(delta, "length", "timeout")
        delta.specials += self._detokenizer.take_specials()
        self.has_expired = self._detokenizer.matched_stop is None  # else what was held back was a stop string's end
        return delta

    @property
    def timing(self) -> RequestTiming | None:
        """Where the time went, if the engine got to tell. It worked on after its last word on that where the choice was
        left before its end: for so long as seen from here."""
        told = self._told_timing
        if told is None or self._has_engine_ended:
            return told
        end = max(self.ended_at, self.last_tokens_at or self.ended_at)
        decode = end - self.started_at - told.queued - told.prefill
        return msgspec.structs.replace(told, decode=max(told.decode, decode))

    @property
    def num_accepted_drafts(self) -> int:
        told = self._told_timing
        return told.num_accepted_drafts if told is not None else self._num_multiple_tokens

    def seconds_in_engine(self) -> tuple[float, float, float]:
        """Queued, prefill and decode; of a choice that was left before the engine told, as seen from here."""
        timing = self.timing
        if timing is not None:
            return timing.queued, timing.prefill, timing.decode
        first_tokens_at = self.first_tokens_at or self.ended_at
        return 0.0, first_tokens_at - self.started_at, self.ended_at - first_tokens_at

    def _take_tokens(self, output: StepOutput, delta: Delta) -> None:
        num_before = self.num_tokens
        for i, token_id in enumerate(output.token_ids):
            delta.token_ids.append(token_id)
            if output.logprobs is not None:
                delta.logprobs.append(output.logprobs[i])
            self.num_tokens += 1
            ends_here = output.stop_token_id is not None and i == len(output.token_ids) - 1
            if ends_here and not self.choice.text.include_stop:
                delta.offsets.append(self._detokenizer.end)
                break
            delta.text += self._detokenizer.push(token_id)
            delta.offsets.append(self._detokenizer.begins_at)
            if self._detokenizer.matched_stop is not None:
                self._finish(delta, "stop", None)
                break
        self._num_multiple_tokens += max(self.num_tokens - num_before - 1, 0)
        if output.token_ids:
            self.last_tokens_at = time.monotonic()
            self.first_tokens_at = self.first_tokens_at or self.last_tokens_at

    def _cut_held_tokens(self, delta: Delta) -> Delta:
        """Takes the tokens of which no text was given out from the end of a delta into the next one."""
        later = Delta(index=self.choice.index)
        if delta.finish_reason is not None or not self._detokenizer.is_holding:
            return later
        num_kept = bisect_left(delta.offsets, self._detokenizer.num_released)
        later.token_ids, later.offsets, later.logprobs = (
            delta.token_ids[num_kept:], delta.offsets[num_kept:], delta.logprobs[num_kept:]
        )  # fmt: skip
        del delta.token_ids[num_kept:], delta.offsets[num_kept:], delta.logprobs[num_kept:]
        return later

    def _finish(self, delta: Delta, reason: FinishReason, stop_reason: int | str | None) -> None:
        delta.text += self._detokenizer.flush()
        if self._detokenizer.matched_stop is not None:
            reason, stop_reason = "stop", self._detokenizer.matched_stop
            delta.offsets = [min(offset, self._detokenizer.num_released) for offset in delta.offsets]
        delta.finish_reason = self.finish_reason = reason
        delta.stop_reason = stop_reason
        self.ended_at = time.monotonic()

    def _stop_reason(self, output: StepOutput) -> int | None:
        return output.stop_token_id if output.stop_token_id in self.choice.asked_stop_ids else None
