"""What rows of an EAGLE head see: the text of their sequence as far as it is known, and the guesses before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.arrays import Bools, Ints
from engine.speculation.eagle_cache import EagleCache
from engine.speculation.eagle_head import RowAttention


class DraftContext:
    """Keys and values of one sequence while it is drafted for: a copy of its text's in order, and of its guesses.

    The text ends before the newest token, which is the first of the guesses: its row comes again, with others behind
    it, when the target has computed it.
    """

    def __init__(
        self, cache: EagleCache, table: Ints, is_known: Bools, *, max_num_guesses: int, window: int | None
    ) -> None:
        """table: blocks of the text; is_known: [tokens of the text] whose rows are there"""
        self.num_text, self._window = len(is_known), window
        num_blocks = -(-self.num_text // cache.block_size)
        self._cache, self._blocks = cache, torch.from_numpy(table[:num_blocks]).to(cache.device)
        self._capacity = max(num_blocks * cache.block_size, self.num_text + max_num_guesses)
        self._is_known = is_known
        self._unknown = torch.from_numpy(np.flatnonzero(~is_known)).to(self._blocks.device)
        self._positions = np.arange(self.num_text + max_num_guesses)
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, keys and values of text and guesses
        self.num_guesses = 0

    def load(self, layer: int) -> None:
        """Copies the text's, which must all be there."""
        self._memory[layer] = self._copy(self._cache.keys[layer]), self._copy(self._cache.values[layer])

    def add(self, positions: Ints) -> list[int]:
        """Places of guesses that stand at these positions of the text."""
        first = self.num_guesses
        self.num_guesses += len(positions)
        self._positions[self.num_text + first : self.num_text + self.num_guesses] = positions
        return list(range(first, self.num_guesses))

    def put(self, layer: int, places: list[int], k: Tensor, v: Tensor) -> None:
        """Keys and values of guesses. k, v: [places, num_kv_heads, head_dim]; places follow each other"""
        keys, values = self._memory[layer]
        rows = slice(self.num_text + places[0], self.num_text + places[-1] + 1)
        keys[rows], values[rows] = k, v

    def attend(self, layer: int, q: Tensor, is_visible: Tensor) -> Tensor:
        """q: [rows, num_heads, head_dim]; is_visible: [rows, num_text + num_guesses]. [rows, num_heads * head_dim]"""
        keys, values = self._memory[layer]
        end = is_visible.shape[1]
        query, k, v = (x.transpose(0, 1)[None] for x in (q, keys[:end], values[:end]))
        attended = F.scaled_dot_product_attention(query, k, v, attn_mask=is_visible, enable_gqa=True)
        return attended[0].transpose(0, 1).flatten(1)

    def visible_by_position(self, positions: Ints) -> Tensor:
        """To rows at these positions: all that stands before them or there. [rows, num_text + num_guesses]"""
        num_keys = self.num_text + self.num_guesses
        known = np.concatenate((self._is_known, np.ones(self.num_guesses, dtype=np.bool_)))
        before = self._positions[:num_keys] <= positions[:, None]
        return self._as_mask(known & before & self._in_window(positions))

    def visible_by_path(self, paths: list[list[int]], positions: Ints) -> Tensor:
        """To guesses at these positions: the text, and the places of their paths, themselves among them."""
        known = np.zeros((len(paths), self.num_text + self.num_guesses), dtype=np.bool_)
        known[:, : self.num_text] = self._is_known
        for row, path in enumerate(paths):
            known[row, self.num_text + np.array(path)] = True
        return self._as_mask(known & self._in_window(positions))

    def _in_window(self, positions: Ints) -> Bools:
        num_keys = self.num_text + self.num_guesses
        if self._window is None:
            return np.ones((1, num_keys), dtype=np.bool_)
        seen: Bools = self._positions[:num_keys] > positions[:, None] - self._window
        return seen

    def _as_mask(self, mask: Bools) -> Tensor:
        return torch.from_numpy(mask).to(self._blocks.device)

    def _copy(self, memory: Tensor) -> Tensor:
        copy = memory.new_empty(self._capacity, *memory.shape[2:])
        num_rows = len(self._blocks) * self._cache.block_size
        copy[:num_rows] = memory.index_select(0, self._blocks).flatten(0, 1)
        copy[self._unknown] = 0  # numbers of others: what is masked must still be finite
        return copy


@dataclass(slots=True)
class TextRows:
    """Rows of one sequence in the first pass: of tokens that the target has just computed, then of guesses.

    start: the first of them in the pass; positions: [rows]; places: of the guesses in the context
    """

    start: int
    num_text: int
    positions: Ints
    places: list[int]
    context: DraftContext | None

    @property
    def end(self) -> int:
        return self.start + len(self.positions)


class FirstPass(RowAttention):
    """Keeps the rows of computed tokens in the cache; rows of one sequence see each other in order.

    slots: [computed tokens] where their rows are kept; text_rows: [computed tokens] of the pass
    """

    def __init__(self, cache: EagleCache, items: list[TextRows], slots: Tensor, text_rows: Tensor) -> None:
        self._cache, self._items, self._slots, self._text_rows = cache, items, slots, text_rows

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._cache.store(layer, k[self._text_rows], v[self._text_rows], self._slots)
        for item in self._items:
            if item.context is not None:
                item.context.load(layer)
                if item.places:
                    rows = slice(item.start + item.num_text, item.end)
                    item.context.put(layer, item.places, k[rows], v[rows])

    def attend(self, layer: int, q: Tensor, rows: Tensor | None) -> Tensor:
        """rows: where not all, those of guesses"""
        parts, start = [], 0
        for item in self._items:
            positions = item.positions if rows is None else item.positions[item.num_text :]
            if len(positions):
                assert item.context is not None, "whoever attends has a context"
                mask = item.context.visible_by_position(positions)
                parts.append(item.context.attend(layer, q[start : start + len(positions)], mask))
                start += len(positions)
        return torch.cat(parts)


@dataclass(slots=True)
class GuessRows:
    """Guesses of one sequence in a later pass. paths: of each, the places of all that it follows, and its own"""

    context: DraftContext
    places: list[int]
    paths: list[list[int]]
    positions: Ints


class LaterPass(RowAttention):
    """Guesses see the text and what they follow."""

    def __init__(self, items: list[GuessRows]) -> None:
        self._items = items

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        start = 0
        for item in self._items:
            rows = slice(start, start + len(item.places))
            item.context.put(layer, item.places, k[rows], v[rows])
            start = rows.stop

    def attend(self, layer: int, q: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is None, "all guesses of a later pass are asked for"
        parts, start = [], 0
        for item in self._items:
            mask = item.context.visible_by_path(item.paths, item.positions)
            parts.append(item.context.attend(layer, q[start : start + len(item.places)], mask))
            start += len(item.places)
        return torch.cat(parts)
