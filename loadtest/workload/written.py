"""Prompts as people write them, for measurements where it matters what the model says: questions, and text to copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np

from loadtest.workload.lengths import Length
from loadtest.workload.prompts import WORDS, Exchange, PromptText, SingleTurns

Author = Callable[[np.random.Generator], str]


@dataclass(frozen=True)
class WrittenWorkload(SingleTurns):
    """The same seed, stream and index give the same exchange; `author` writes each prompt, as long as it likes.

    Two prompts could be alike by chance: one pair in 23 million. sends_seeds: requests name a seed to sample by
    """

    name: str
    author: Author
    output_length: Length
    seed: int
    stream: int = 0
    sends_seeds: bool = False

    prompt_length: ClassVar[str] = "written"
    num_shared_tokens: ClassVar[int] = 0
    shared_fraction: ClassVar[float] = 0.0
    text: ClassVar[PromptText | None] = None

    def of_stream(self, stream: int, text: PromptText | None) -> WrittenWorkload:
        """The same with other prompts; text: does not matter here."""
        return replace(self, stream=stream)

    def exchange(self, index: int) -> Exchange:
        random = np.random.default_rng((self.seed, self.stream, index))
        prompt, num_output_tokens = self.author(random), self.output_length.draw(random)
        return Exchange(prompt, num_output_tokens, int(random.integers(2**31)) if self.sends_seeds else None)


class _Phrases(msgspec.Struct):
    """Of questions (opening, request, asker and form, in this order) and of paragraphs. A `{}` is to be filled in: in a
    request with a topic, in a sentence with any noun."""

    openings: list[str]
    requests: list[str]
    topics: list[str]
    askers: list[str]
    forms: list[str]
    sentences: list[str]


@cache
def _phrases() -> _Phrases:
    return msgspec.json.decode(Path(__file__).with_name("phrases.json").read_bytes(), type=_Phrases)


def write_question(random: np.random.Generator) -> str:
    """A question of an ordinary user that takes more than a few words to answer."""
    phrases = _phrases()
    parts = (phrases.openings, phrases.requests, phrases.askers, phrases.forms)
    question = " ".join(text for text in (_choose(random, part) for part in parts) if text)
    return question.format(_choose(random, phrases.topics))


def write_copied(random: np.random.Generator) -> str:
    """A paragraph of about 130 tokens that stands there twice and begins a third time: the model goes on copying it."""
    chosen = random.permutation(len(_phrases().sentences))[:_NUM_SENTENCES]
    paragraph = " ".join(_phrases().sentences[i].format(_choose(random, WORDS)) for i in chosen) + "\n"
    return paragraph + paragraph + " ".join(paragraph.split(" ")[:3])


def _choose(random: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(random.integers(len(choices)))]


_NUM_SENTENCES = 9  # of 13 words each
