"""An echo: the text of a prompt at the head of an answer, and where in it each prompt token begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.generation.prompts import Prompt
from server.off_loop import off_loop
from server.text.detokenizer import Detokenizer, TextOptions
from server.text.tokenizer import Tokenizer

MANY_TOKENS = 512  # of all prompts of a request; placing more than this leaves the event loop for a thread


@dataclass(frozen=True, slots=True)
class Echo:
    """The text of a prompt and where in it each token begins.

    offsets: in characters, one per prompt token; a token in the middle of a character begins at that character
    """

    text: str
    offsets: list[int]


async def read_echoes(prompts: Sequence[Prompt], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[Echo]:
    """The echo of each prompt: a text as the client wrote it, ids as their decoded text, special tokens included."""

    def place() -> list[Echo]:
        return [_place(prompt, tokenizer, add_special_tokens) for prompt in prompts]

    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return place() if num_tokens < MANY_TOKENS else await off_loop(place)


def _place(prompt: Prompt, tokenizer: Tokenizer, add_special_tokens: bool) -> Echo:
    if prompt.text is None:
        return _spell(prompt.token_ids, tokenizer)
    spans = tokenizer.token_spans(prompt.text, add_special_tokens=add_special_tokens)
    own = [token_id for token_id, span in zip(prompt.token_ids, spans, strict=True) if span is not None]
    spelt = _spell(own, tokenizer)
    if spelt.text != prompt.text:  # the tokenizer composed characters, or left some out
        return Echo(prompt.text, _begins(prompt.text, spans))
    begins, num_before, offsets = [*spelt.offsets, len(prompt.text)], 0, []
    for span in spans:
        offsets.append(begins[num_before])  # what was added begins where the next one does
        num_before += span is not None
    return Echo(prompt.text, offsets)


def _begins(text: str, spans: list[tuple[int, int] | None]) -> list[int]:
    """Where tokens begin: where the one before ended, or at the character that they share.

    What lies between two tokens belongs to the first (marks composed with its last letter), blanks to the second.
    """
    begins: list[int] = []
    end = 0
    for span in spans:
        if span is None:
            begins.append(end)
            continue
        gap = text[end : span[0]]
        begins.append(min(span[0], end + len(gap.rstrip())))
        end = max(end, span[1])
    return begins


def _spell(token_ids: list[int], tokenizer: Tokenizer) -> Echo:
    """Joins the tokens' texts, less the blank that some tokenizers write before a text and decode to nothing."""
    detokenizer = Detokenizer(tokenizer, TextOptions(skip_special_tokens=False))
    pieces, offsets = [], []
    for token_id in token_ids:
        pieces.append(detokenizer.push(token_id))
        offsets.append(detokenizer.begins_at)
    text = "".join([*pieces, detokenizer.flush()])
    num_dropped = max(_num_blanks(text) - _num_blanks(tokenizer.decode(token_ids, skip_special_tokens=False)), 0)
    return Echo(text[num_dropped:], [max(offset - num_dropped, 0) for offset in offsets])


def _num_blanks(text: str) -> int:
    return len(text) - len(text.lstrip(" "))
