"""Keys and values of an EAGLE head, in the blocks that the target's sequences have.

A row of the head depends on its token, and on the target's states of all tokens before it: on the text up to the token
and nothing behind it, as the target's own keys and values do. So it lies where these lie, and a prefix that a sequence
finds has its rows too. Beside them lies the fused state of each block's last token, which the first row behind a prefix
is made of.

The head sees no step that ran in parts, and blocks change hands meanwhile. So each block has a stamp, which changes
whenever somebody writes into it, and a full one the digest of the text that its rows are of. What a sequence believes
of a block counts only while the stamp is the one it knows, or the digest is its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Bools, Ints
from engine.speculation.eagle_config import EagleConfig

NULL_BLOCK = 0


class KnownRows:
    """What the cache holds of one sequence.

    is_known: [tokens or more] whether the row of a token is there; of the first one, there is none
    state: [hidden_size] the fused state of the token at `state_at`
    """

    def __init__(self) -> None:
        self.is_known: Bools = np.zeros(0, dtype=np.bool_)
        self.state: Tensor | None = None
        self.state_at = -1
        self._blocks: Ints = np.zeros(0, dtype=np.int64)
        self._stamps: Ints = np.zeros(0, dtype=np.int64)

    def follow(self, cache: EagleCache, table: Ints, hashes: list[bytes], num_tokens: int) -> None:
        """Believes what is still true of the first `num_tokens` tokens, and nothing of later ones.

        table: the sequence's blocks, enough for these tokens
        """
        size = cache.block_size
        num_blocks = -(-num_tokens // size)
        self._grow(len(table), size)
        blocks, stamps = table[:num_blocks], cache.stamps[table[:num_blocks]]
        is_same = (self._blocks[:num_blocks] == blocks) & (self._stamps[:num_blocks] == stamps)
        for index in np.flatnonzero(~is_same).tolist():
            block, end = int(blocks[index]), (index + 1) * size
            is_found = end <= num_tokens and index < len(hashes) and cache.holds(block, hashes[index])
            self.is_known[index * size : end] = is_found
        self._blocks[:num_blocks], self._stamps[:num_blocks] = blocks, stamps
        self.is_known[num_tokens:] = False
        self.is_known[:1] = False

    def state_before(self, cache: EagleCache, position: int) -> Tensor | None:
        """The fused state of the token before this position, if it is there. [hidden_size]"""
        if self.state_at == position - 1:
            return self.state
        index = position // cache.block_size - 1
        if position % cache.block_size or index < 0 or not cache.has_digest(int(self._blocks[index])):
            return None
        return cache.last_states[self._blocks[index]] if self.is_known[position - 1] else None

    def claim(self, cache: EagleCache, table: Ints, first: int, end: int) -> None:
        """Before the rows of tokens `first` to `end` are written."""
        for index in range(first // cache.block_size, -(-end // cache.block_size)):
            self._blocks[index] = table[index]
            self._stamps[index] = cache.claim(int(table[index]))

    def keep(self, cache: EagleCache, hashes: list[bytes], first: int, end: int) -> None:
        """After they were written, and the last states of the blocks that they fill."""
        self.is_known[first:end] = True
        size = cache.block_size
        for index in range(first // size, min(end // size, len(hashes))):
            start = max(index * size, 1)
            if self.is_known[start : (index + 1) * size].all():
                cache.remember(int(self._blocks[index]), hashes[index])

    def _grow(self, num_blocks: int, size: int) -> None:
        more = num_blocks - len(self._blocks)
        if more > 0:
            more += num_blocks // 4
            self._blocks = np.concatenate((self._blocks, np.full(more, -1)))
            self._stamps = np.concatenate((self._stamps, np.full(more, -1)))
            self.is_known = np.concatenate((self.is_known, np.zeros(more * size, dtype=np.bool_)))


class EagleCache:
    """The memory of all blocks. keys, values: of each layer, [num_blocks, block_size, num_kv_heads, head_dim]

    last_states: [num_blocks, hidden_size] the fused state of a full block's last token; stamps: [num_blocks]
    """

    def __init__(
        self, config: EagleConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.num_blocks, self.device = block_size, num_blocks, device
        shape = num_blocks, block_size, config.num_kv_heads, config.head_dim
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.last_states = torch.zeros(num_blocks, config.hidden_size, dtype=dtype, device=device)
        self.stamps: Ints = np.zeros(num_blocks, dtype=np.int64)
        self._newest_stamp = 0
        self._digests: dict[int, bytes] = {}

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k, v: [n, num_kv_heads, head_dim]; slots: [n] block * block_size + offset"""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def claim(self, block: int) -> int:
        """The stamp of a block that is about to be written into."""
        assert block != NULL_BLOCK, "a token that is computed has a place"
        self._newest_stamp += 1
        self.stamps[block] = self._newest_stamp
        self._digests.pop(block, None)
        return self._newest_stamp

    def remember(self, block: int, digest: bytes) -> None:
        self._digests[block] = digest

    def holds(self, block: int, digest: bytes) -> bool:
        return block != NULL_BLOCK and self._digests.get(block) == digest

    def has_digest(self, block: int) -> bool:
        return block in self._digests


def cache_bytes_per_token(config: EagleConfig, block_size: int) -> int:
    """Of rows in float32, of the copy that a sequence's passes read, and of its share of the block's last state."""
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return 4 * (2 * row + -(-config.hidden_size // block_size))
