"""Log-probabilities in three formats: OpenAI's for completions, OpenAI's for chat, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import TokenLogprobs
from server.api.echo import Echo
from server.protocol.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from server.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenNames:
    """How tokens are written in an answer: as text, or as `token_id:123`, which tells apart what looks alike."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self.as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def completion_logprobs(
    items: Sequence[TokenLogprobs], offsets: Sequence[int], names: TokenNames, *, num_top: int
) -> CompletionLogprobs:
    """offsets: where each token begins in the choice's text, in characters."""
    return CompletionLogprobs(
        text_offset=list(offsets),
        token_logprobs=[_finite(item.logprob) for item in items],
        tokens=[names(item.token_id) for item in items],
        top_logprobs=[_top_by_name(item, names, num_top) for item in items],
    )


def echoed_logprobs(
    token_ids: Sequence[int], items: Sequence[TokenLogprobs], names: TokenNames, *, num_top: int, echo: Echo
) -> CompletionLogprobs:
    """The prompt's part of an echo. items: one for each token but the first, whose log-probability is null."""
    offsets = echo.offsets
    scored = completion_logprobs(items, offsets[1:], names, num_top=num_top)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None, *scored.token_logprobs],
        tokens=[names(token_ids[0]), *scored.tokens],
        top_logprobs=[None, *scored.top_logprobs],
    )


def joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(items: Sequence[TokenLogprobs], names: TokenNames, *, num_top: int) -> ChatLogprobs:
    def top(item: TokenLogprobs) -> list[TopLogprob]:
        return [
            TopLogprob(names(token_id), _finite(value), _bytes(token_id, names))
            for token_id, value in _top(item, num_top)
        ]

    return ChatLogprobs(
        [
            ChatTokenLogprob(
                names(item.token_id), _finite(item.logprob), _bytes(item.token_id, names), top_logprobs=top(item)
            )
            for item in items
        ]
    )


def prompt_logprobs(items: Sequence[TokenLogprobs], names: TokenNames, *, num_top: int) -> PromptLogprobs:
    """vLLM's format: null for the first token, then per token a map from ids to what is known of them."""
    return [None, *(_by_id(item, names, num_top) for item in items)]


def _by_id(item: TokenLogprobs, names: TokenNames, num_top: int) -> dict[str, PromptLogprob]:
    text = names.tokenizer.token_text
    known = {str(item.token_id): PromptLogprob(_finite(item.logprob), item.rank, text(item.token_id))}
    for rank, (token_id, value) in enumerate(_top(item, num_top), start=1):
        known.setdefault(str(token_id), PromptLogprob(_finite(value), rank, text(token_id)))
    return known


def _top_by_name(item: TokenLogprobs, names: TokenNames, num_top: int) -> dict[str, float]:
    """The most likely tokens and, whether it is one of them or not, the token itself."""
    top: dict[str, float] = {}
    for token_id, value in [*_top(item, num_top), (item.token_id, item.logprob)]:
        top.setdefault(names(token_id), _finite(value))  # of tokens that look alike the likeliest is shown
    return top


def _top(item: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    return list(zip(item.top_token_ids, item.top_logprobs, strict=True))[:num_top]


def _bytes(token_id: int, names: TokenNames) -> list[int]:
    return list(names.tokenizer.token_bytes(token_id))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
