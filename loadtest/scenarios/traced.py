"""The requests of a trace: prompts of the recorded lengths, that share what the recorded ones shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loadtest.scenarios.trace_file import Trace, TraceRequest
from loadtest.workload.arrivals import RecordedArrivals
from loadtest.workload.prompts import Exchange, Prompt, PromptText, SingleTurns, draw_ids, draw_words

_BLOCKS = 0xB10C  # keeps the draws of shared blocks apart from those of prompts, which use the same seed


@dataclass(frozen=True)
class TraceWorkload(SingleTurns):
    """The exchanges of a trace, in its order; after the last the first comes again, as a warm-up may want.

    block_size: tokens of a block that a hash id names
    """

    requests: Sequence[TraceRequest]
    name: str
    seed: int
    block_size: int = 512
    stream: int = 0
    token_ids: tuple[int, int] = (1000, 30000)
    text: PromptText | None = None

    num_shared_tokens: ClassVar[int] = 0  # as many as the hash ids say
    shared_fraction: ClassVar[float] = 0.0

    @property
    def prompt_length(self) -> str:
        return f"recorded, mean {np.mean([request.num_prompt_tokens for request in self.requests]):,.0f}"

    @property
    def output_length(self) -> str:
        return f"recorded, mean {np.mean([request.num_output_tokens for request in self.requests]):,.0f}"

    def of_stream(self, stream: int, text: PromptText | None) -> TraceWorkload:
        return replace(self, stream=stream, text=text)

    def exchange(self, index: int) -> Exchange:
        request = self.requests[index % len(self.requests)]
        return Exchange(self._prompt(request, index), request.num_output_tokens)

    def _prompt(self, request: TraceRequest, index: int) -> Prompt:
        parts = list(self._parts(request, index))
        if self.text is None:
            return [token for random, number in parts for token in draw_ids(random, number, self.token_ids)]
        left = max(request.num_prompt_tokens - self.text.tokens_of_template, 1)
        texts = []
        for random, number in parts:
            number = min(number, round(left))
            if number > 0:
                texts.append(draw_words(random, self.text.words_for(number)).strip())
            left -= number
        return " ".join(texts)

    def _parts(self, request: TraceRequest, index: int) -> Iterator[tuple[np.random.Generator, int]]:
        """What each part of a prompt is drawn from, and its tokens: blocks by their ids, and then what is its own."""
        left = request.num_prompt_tokens
        for hash_id in request.hash_ids:
            number = min(self.block_size, left)
            if number:
                seed = (self.seed, self.stream, _BLOCKS, hash_id & 0xFFFFFFFFFFFFFFFF)
                yield np.random.default_rng(seed), number
            left -= number
        if left:
            yield np.random.default_rng((self.seed, self.stream, index)), left


def arrivals_of(trace: Trace, *, speed: float) -> RecordedArrivals:
    """When the requests of a trace come, at so many times its speed."""
    name = trace.name if speed == 1.0 else f"{trace.name} at {speed:g} times its speed"
    return RecordedArrivals([request.at / speed for request in trace.requests], name)


def with_lengths(trace: Trace, *, scale: float, max_prompt_tokens: int | None, max_output_tokens: int | None) -> Trace:
    """The same with prompts and answers of so many times the length, and no longer than that, for smaller servers."""

    def fitted(request: TraceRequest) -> TraceRequest:
        prompt, output = (max(round(scale * n), 1) for n in (request.num_prompt_tokens, request.num_output_tokens))
        return request._replace(
            num_prompt_tokens=prompt if max_prompt_tokens is None else min(prompt, max_prompt_tokens),
            num_output_tokens=output if max_output_tokens is None else min(output, max_output_tokens),
        )

    return replace(trace, requests=[fitted(request) for request in trace.requests])
