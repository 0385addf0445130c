"""What is asked: prompts and output lengths, drawn from a seed, no two prompts alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loadtest.workload.lengths import Length

Prompt = list[int] | str

_SINGLE_TOKEN_WORDS = (  # with the space before them, in every common vocabulary
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
WORDS = tuple(_SINGLE_TOKEN_WORDS.split(" "))


@dataclass(frozen=True)
class Exchange:
    """One request to be sent: the prompt, how many tokens to ask for, and the seed of its sampling if it names one."""

    prompt: Prompt
    num_output_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class PromptText:
    """Prompts of words, for servers that take no token ids: tokens = tokens_of_template + tokens_per_word * words."""

    tokens_of_template: float
    tokens_per_word: float

    def num_words(self, num_tokens: int) -> int:
        """Words that bring a prompt to `num_tokens` tokens. ValueError if the template alone is longer."""
        words = round((num_tokens - self.tokens_of_template) / self.tokens_per_word)
        if words < 1:
            raise ValueError(
                f"a prompt of {num_tokens} tokens leaves no room beside the chat template's "
                f"{self.tokens_of_template:g} tokens; ask for longer prompts"
            )
        return words


@dataclass(frozen=True)
class Workload:
    """The same seed, stream and index give the same exchange; other streams and indexes give other prompts.

    `shared_fraction` of the requests begin with the same `num_shared_tokens` tokens. Token ids are drawn from
    `token_ids` (low, high; both included). With `text` the prompts are words instead.
    """

    prompt_length: Length
    output_length: Length
    seed: int
    stream: int = 0
    num_shared_tokens: int = 0
    shared_fraction: float = 1.0
    token_ids: tuple[int, int] = (1000, 30000)
    text: PromptText | None = None

    name: ClassVar[str] = ""  # random prompts have none

    def of_stream(self, stream: int, text: PromptText | None) -> Workload:
        """The same with the prompts of another stream, for a server that takes them so."""
        return replace(self, stream=stream, text=text)

    def exchange(self, index: int) -> Exchange:
        random = np.random.default_rng((self.seed, self.stream, index))
        num_tokens = self.prompt_length.draw(random)
        num_output_tokens = self.output_length.draw(random)
        is_shared = self.num_shared_tokens > 0 and float(random.random()) < self.shared_fraction
        num_shared = min(self.num_shared_tokens, num_tokens - 1) if is_shared else 0  # the last token is always its own
        if self.text is not None:
            prompt: Prompt = self._words(random, self.text.num_words(num_tokens), num_shared)
        else:
            prompt = self._draw(self._shared_random(), num_shared) + self._draw(random, num_tokens - num_shared)
        return Exchange(prompt, num_output_tokens)

    def _shared_random(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, _SHARED_STREAM))  # the same in all streams: a prefix outlives a round

    def _draw(self, random: np.random.Generator, num_tokens: int) -> list[int]:
        low, high = self.token_ids
        ids: list[int] = random.integers(low, high + 1, size=num_tokens).tolist()
        return ids

    def _words(self, random: np.random.Generator, num_words: int, num_shared: int) -> str:
        num_shared = min(num_shared, num_words - 1)
        own = random.integers(0, len(WORDS), size=num_words - num_shared)
        shared = self._shared_random().integers(0, len(WORDS), size=num_shared)
        return "".join(f" {WORDS[i]}" for i in np.concatenate([shared, own]))


_SHARED_STREAM = 0x5A4ED
