"""What is asked: prompts and output lengths, drawn from a seed, no two prompts alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from loadtest.workload.lengths import Length


class Message(NamedTuple):
    """Of a conversation. role: system, user or assistant"""

    role: str
    content: str


Prompt = list[int] | str | tuple[Message, ...]

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
    """One request to be sent: the prompt, how many tokens to ask for, and the seed of its sampling if it names one.

    api_key: of the tenant that sends it; None: the target's
    """

    prompt: Prompt
    num_output_tokens: int
    seed: int | None = None
    api_key: str | None = None


@dataclass(frozen=True)
class FollowUp:
    """The next turn of a conversation. think_seconds: after the answer, before it is sent"""

    exchange: Exchange
    think_seconds: float


class AnyWorkload(Protocol):
    """What a run sends. The same seed, stream and index give the same exchange; other streams and indexes give others.

    name: what the prompts say, where they are written for a purpose; prompt_length, output_length: in words
    """

    @property
    def name(self) -> str: ...

    @property
    def prompt_length(self) -> object: ...

    @property
    def output_length(self) -> object: ...

    @property
    def num_shared_tokens(self) -> int: ...

    @property
    def shared_fraction(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def stream(self) -> int: ...

    @property
    def text(self) -> PromptText | None: ...

    def of_stream(self, stream: int, text: PromptText | None) -> AnyWorkload:
        """The same with other prompts, for a server that takes them so."""
        ...

    def exchange(self, index: int) -> Exchange: ...

    def follow_up(self, index: int, turn: int, before: Exchange, answer: str) -> FollowUp | None:
        """What is sent after the answer to `before`, which was turn 0, 1, ...; None: the conversation is over."""
        ...

    def kind_of(self, index: int) -> str:
        """The kind of traffic that it belongs to; empty where there is only one."""
        ...


class SingleTurns:
    """A workload of one kind, whose exchanges have nothing to do with each other."""

    def follow_up(self, index: int, turn: int, before: Exchange, answer: str) -> FollowUp | None:
        return None

    def kind_of(self, index: int) -> str:
        return ""


@dataclass(frozen=True)
class PromptText:
    """Prompts of words, for servers that take no token ids: tokens = tokens_of_template + tokens_per_word * words."""

    tokens_of_template: float
    tokens_per_word: float

    def words_for(self, num_tokens: float) -> int:
        """Words of so many tokens, whatever the template adds; at least one."""
        return max(round(num_tokens / self.tokens_per_word), 1)

    def num_words(self, num_tokens: int) -> int:
        """Words that bring a prompt to `num_tokens` tokens. ValueError if the template alone is longer."""
        words = round((num_tokens - self.tokens_of_template) / self.tokens_per_word)
        if words < 1:
            raise ValueError(
                f"a prompt of {num_tokens} tokens leaves no room beside the chat template's "
                f"{self.tokens_of_template:g} tokens; ask for longer prompts"
            )
        return words


def draw_ids(random: np.random.Generator, num_tokens: int, token_ids: tuple[int, int]) -> list[int]:
    """token_ids: the lowest and the highest"""
    ids: list[int] = random.integers(token_ids[0], token_ids[1] + 1, size=num_tokens).tolist()
    return ids


def draw_words(random: np.random.Generator, num_words: int) -> str:
    return "".join(f" {WORDS[i]}" for i in random.integers(0, len(WORDS), size=num_words))


@dataclass(frozen=True)
class Workload(SingleTurns):
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
            shared = draw_ids(self._shared_random(), num_shared, self.token_ids)
            prompt = shared + draw_ids(random, num_tokens - num_shared, self.token_ids)
        return Exchange(prompt, num_output_tokens)

    def _shared_random(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, _SHARED_STREAM))  # the same in all streams: a prefix outlives a round

    def _words(self, random: np.random.Generator, num_words: int, num_shared: int) -> str:
        num_shared = min(num_shared, num_words - 1)
        own = draw_words(random, num_words - num_shared)
        return draw_words(self._shared_random(), num_shared) + own


_SHARED_STREAM = 0x5A4ED
