"""Prompts and texts for training as token ids."""

from __future__ import annotations

import asyncio
from itertools import islice
from pathlib import Path

from server.text.chat_renderer import ChatRenderer
from server.text.tokenizer import Tokenizer
from server.training.chat_prompts import Turns, chat_prompts

PIECE = 512  # tokens of a text that the model reads at once


def own_prompts(tokenizer: Tokenizer, count: int, *, seed: int) -> list[list[int]]:
    """So many of our own conversations, through the model's chat template; as plain text where it has none."""
    conversations = list(islice(chat_prompts(seed), count))
    if not tokenizer.has_chat_template:
        return [tokenizer.encode(turns[-1]["content"] + "\n", add_special_tokens=True) for turns in conversations]
    return asyncio.run(_rendered(tokenizer, conversations))


async def _rendered(tokenizer: Tokenizer, conversations: list[Turns]) -> list[list[int]]:
    renderer = ChatRenderer()
    try:
        prompts = []
        for turns in conversations:
            text = await tokenizer.render_chat(
                renderer, turns, add_generation_prompt=True, continue_final_message=False, variables={}
            )
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        return prompts
    finally:
        renderer.close()


def read_texts(
    tokenizer: Tokenizer, file: Path, *, flag: str = "--text", max_chars: int | None = None
) -> list[list[int]]:
    """The pieces of a text file, or of its beginning. flag: that named it. ValueError where it cannot be read."""
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(max_chars)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {file} cannot be read as UTF-8 text: {error}") from error
    token_ids = tokenizer.encode(text, add_special_tokens=True)
    pieces = [token_ids[start : start + PIECE] for start in range(0, len(token_ids), PIECE)]
    return [piece for piece in pieces if len(piece) > 1]
