"""The requests of a scenario: kinds of traffic by their weights, shared prefixes, conversations of several turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import ClassVar

import numpy as np

from loadtest.scenarios.scenario_file import Scenario, Traffic
from loadtest.workload.lengths import Length
from loadtest.workload.prompts import Exchange, FollowUp, Message, Prompt, PromptText, draw_ids, draw_words

_KINDS = 0x7A1C  # keep the draws of different purposes apart, which use the same seed
_PREFIXES = 0x5EED


@dataclass(frozen=True)
class TrafficWorkload:
    """The exchanges of a scenario. The index counts conversations; what a follow-up says depends on the answer alone
    beside what the first turn does.

    keys: API keys by tenant; text: words per token, or None for token ids. A prefix is the same in all streams.
    """

    scenario: Scenario
    name: str
    seed: int
    keys: Mapping[str, str] = field(default_factory=dict)
    stream: int = 0
    token_ids: tuple[int, int] = (1000, 30000)
    text: PromptText | None = None

    num_shared_tokens: ClassVar[int] = 0  # each kind of traffic has its own
    shared_fraction: ClassVar[float] = 0.0

    @property
    def prompt_length(self) -> str:
        return _together(traffic.prompt for traffic in self.scenario.traffic)

    @property
    def output_length(self) -> str:
        return _together(traffic.output for traffic in self.scenario.traffic)

    def of_stream(self, stream: int, text: PromptText | None) -> TrafficWorkload:
        return replace(self, stream=stream, text=text)

    def kind_of(self, index: int) -> str:
        return self._traffic(index).name if len(self.scenario.traffic) > 1 else ""

    def exchange(self, index: int) -> Exchange:
        traffic, random = self._traffic(index), self._random(index, 0)
        num_tokens, num_output_tokens = traffic.prompt.draw(random), traffic.output.draw(random)
        key = None if traffic.tenant is None else self.keys[traffic.tenant]
        prefix = traffic.shared_prefix
        group = 0 if prefix is None else int(random.integers(prefix.groups))
        return Exchange(self._first_prompt(traffic, random, num_tokens, group), num_output_tokens, api_key=key)

    def follow_up(self, index: int, turn: int, before: Exchange, answer: str) -> FollowUp | None:
        traffic = self._traffic(index)
        if turn + 1 >= traffic.turns.draw(self._random(index, -1)):
            return None
        assert isinstance(before.prompt, tuple), "only a chat has turns"
        assert self.text is not None, "a chat is made of words"
        random = self._random(index, turn + 1)
        words = draw_words(random, self.text.words_for(traffic.prompt.draw(random)))
        said = (*before.prompt, Message("assistant", answer), Message("user", words.strip()))
        think_seconds = float(random.exponential(traffic.think_seconds)) if traffic.think_seconds else 0.0
        return FollowUp(replace(before, prompt=said, num_output_tokens=traffic.output.draw(random)), think_seconds)

    def _first_prompt(self, traffic: Traffic, random: np.random.Generator, num_tokens: int, group: int) -> Prompt:
        prefix = traffic.shared_prefix
        number = self.scenario.traffic.index(traffic)
        shared = np.random.default_rng((self.seed, _PREFIXES, number, group))
        num_shared = 0 if prefix is None else prefix.tokens
        if self.text is None:
            return draw_ids(shared, num_shared, self.token_ids) + draw_ids(random, num_tokens, self.token_ids)
        words = draw_words(random, self.text.words_for(num_tokens - self.text.tokens_of_template)).strip()
        opening = draw_words(shared, self.text.words_for(num_shared)).strip() if num_shared else ""
        if self.scenario.api == "completions":
            return " ".join(part for part in (opening, words) if part)
        system = (Message("system", opening),) if opening else ()
        return (*system, Message("user", words))

    def _traffic(self, index: int) -> Traffic:
        kinds = self.scenario.traffic
        if len(kinds) == 1:
            return kinds[0]
        *bounds, total = accumulate(kind.weight for kind in kinds)
        drawn = float(np.random.default_rng((self.seed, _KINDS, index)).random()) * total
        return kinds[sum(drawn >= bound for bound in bounds)]

    def _random(self, index: int, turn: int) -> np.random.Generator:
        """turn: -1 for what is drawn once for a conversation"""
        return np.random.default_rng((self.seed, self.stream, index, turn + 1))


def _together(lengths: Iterable[Length]) -> str:
    return ", ".join(dict.fromkeys(map(str, lengths)))
