"""Lets the target answer prompts or read texts, and keeps its hidden states: exactly those that a proposer is shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from engine.engine import Engine
from engine.speculation.proposer import Proposer, ProposerNeeds
from engine.speculation.speculator import Speculator
from engine.speculation.verified_step import VerifiedStep
from engine.training.transcripts import Transcript, to_half
from engine.types import Request, SamplingParams

MAX_TEXT_TOKENS = 512  # of one piece of a text


class AnswerStates:
    """A proposer that proposes nothing, and keeps the state that each token was sampled from, by request."""

    needs = ProposerNeeds(hidden="newest")

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self.of_request: defaultdict[str, list[Tensor]] = defaultdict(list)

    def propose(self, step: VerifiedStep) -> None:
        states = to_half(step.newest_hidden()[:, : self._hidden_size])
        for seq, state in zip(step.drafting, states, strict=True):
            self.of_request[seq.request.request_id].append(state)


class TextStates:
    """A proposer that proposes nothing, and keeps the states of prompts, by request."""

    needs = ProposerNeeds(hidden="all")

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self.of_request: dict[str, Tensor] = {}

    def propose(self, step: VerifiedStep) -> None:
        for seq, first, rows, *_ in step.kept():
            name = seq.request.request_id
            states = to_half(step.hidden()[torch.from_numpy(rows), : self._hidden_size])
            self.of_request[name] = torch.cat((self.of_request[name][:first], states)) if first else states


def with_proposer(engine: Engine, proposer: Proposer) -> Engine:
    """An engine of the same parts with another proposer. The first one must not be stepped any more."""
    return Engine(engine.executor, engine.scheduler, Speculator(proposer, engine.executor.vocab_size), engine.cost)


class Collector:
    """Keeps `num_at_once` sequences running."""

    def __init__(self, engine: Engine, *, hidden_size: int, max_model_len: int, num_at_once: int) -> None:
        self._engine = engine
        self._hidden_size, self._max_model_len, self._num_at_once = hidden_size, max_model_len, num_at_once

    def answers(
        self, prompts: Iterable[tuple[int, list[int]]], *, eos_token_ids: list[int], max_tokens: int
    ) -> Iterator[Transcript]:
        """The answers to prompts, which come with their indices, as they end: the token that ends one included.

        Half of them are greedy, the others at temperatures of 0.7 to 1. Prompts that are too long are left out.
        """
        states, ends = AnswerStates(self._hidden_size), set(eos_token_ids)
        engine = with_proposer(self._engine, states)
        fitting = (pair for pair in prompts if len(pair[1]) + max_tokens + 1 <= self._max_model_len)
        answers: dict[str, list[int]] = {}
        while True:
            for index, prompt in _take(fitting, self._num_at_once - len(answers)):
                params = sampling_of(index, max_tokens + 1)  # one more: of a request that ended, nothing is shown
                engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params))
                answers[str(index)] = []
            if not answers:
                return
            for output in engine.step()[0]:
                name = output.request_id
                answers[name] += output.token_ids
                if output.error is not None:
                    del answers[name], states.of_request[name]
                elif answers[name][-1] in ends or len(answers[name]) == max_tokens:
                    engine.abort(name)
                    yield Transcript(int(name), _ids(answers.pop(name)), torch.stack(states.of_request.pop(name)))

    def texts(self, texts: Iterable[tuple[int, list[int]]]) -> Iterator[Transcript]:
        """Texts as the target reads them, the first `MAX_TEXT_TOKENS` of each; its very first token is context."""
        states = TextStates(self._hidden_size)
        engine = with_proposer(self._engine, states)
        longest = min(MAX_TEXT_TOKENS, self._max_model_len - 2)
        pending = ((index, text[:longest]) for index, text in texts if len(text) > 1)
        running: dict[str, list[int]] = {}
        while True:
            for index, text in _take(pending, self._num_at_once - len(running)):
                params = SamplingParams(seed=index, max_tokens=1, temperature=0.0)
                engine.add(Request(request_id=str(index), prompt_token_ids=text, params=params, cache_salt=str(index)))
                running[str(index)] = text
            if not running:
                return
            for output in engine.step()[0]:
                name = output.request_id
                text = running.pop(name)
                read = states.of_request.pop(name, None)
                if output.error is None and read is not None:
                    yield Transcript(int(name), _ids(text[1:]), read[: len(text) - 1])


def sampling_of(index: int, max_tokens: int) -> SamplingParams:
    """How the answer to a prompt is sampled, by its index."""
    temperature = 0.0 if index % 2 == 0 else 0.7 + 0.1 * (index // 2 % 4)
    return SamplingParams(seed=index, max_tokens=max_tokens, temperature=temperature)


def _take(items: Iterator[tuple[int, list[int]]], count: int) -> Iterator[tuple[int, list[int]]]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _ids(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int32)
