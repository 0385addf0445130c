"""How many words make a prompt of so many tokens, for servers that take text only."""

from __future__ import annotations

import numpy as np

from loadtest.client import Client, Target
from loadtest.outcome import Answer
from loadtest.workload import WORDS, Exchange, PromptText

_SHORT, _LONG = 8, 136  # words; two points make the line


async def calibrate(target: Target, *, seed: int) -> PromptText:
    """Asks the server itself, through the `usage` of two short answers: any server that reports usage can be asked.

    Raises ValueError if it does not, or fails.
    """
    random = np.random.default_rng(seed)
    async with Client(target) as client:
        short = await _num_tokens(client, _words(random, _SHORT))
        long = await _num_tokens(client, _words(random, _LONG))
    tokens_per_word = (long - short) / (_LONG - _SHORT)
    return PromptText(tokens_of_template=short - tokens_per_word * _SHORT, tokens_per_word=tokens_per_word)


def _words(random: np.random.Generator, num_words: int) -> str:
    return "".join(f" {WORDS[i]}" for i in random.integers(0, len(WORDS), size=num_words))


async def _num_tokens(client: Client, text: str) -> int:
    url = client.target.base_url
    outcome = await client.send(Exchange(text, num_output_tokens=4))
    if not isinstance(outcome, Answer):
        raise ValueError(f"{url}: no answer to count prompt tokens by: {outcome.kind}: {outcome.detail}")
    if outcome.num_prompt_tokens < 1:
        raise ValueError(f"{url} reports no usage, so text prompts cannot be sized; send token ids")
    return outcome.num_prompt_tokens
