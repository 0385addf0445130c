"""Long iterations over files, in pieces, so that neither the event loop nor memory has more than one at a time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from server.off_loop import off_loop
from server.offline.answer_lines import AnswerLine
from server.offline.request_lines import Line, RequestLine

T = TypeVar("T", Line, AnswerLine)

MAX_ITEMS = 512
MAX_BYTES = 1 << 20
MAX_SECONDS = 0.02  # that a piece may keep the interpreter


async def in_pieces(items: Iterator[T]) -> AsyncIterator[T]:
    """The items, which are made off the event loop."""
    while piece := await off_loop(_take, items):
        for item in piece:
            yield item


def _take(items: Iterator[T]) -> list[T]:
    piece: list[T] = []
    num_bytes, ends_at = 0, time.monotonic() + MAX_SECONDS
    for item in items:
        piece.append(item)
        num_bytes += _size(item)
        if len(piece) == MAX_ITEMS or num_bytes > MAX_BYTES or time.monotonic() > ends_at:
            break
    return piece


def _size(item: Line | AnswerLine) -> int:
    if isinstance(item, AnswerLine):
        return len(item.data)
    return len(item.body) if isinstance(item, RequestLine) else 0
