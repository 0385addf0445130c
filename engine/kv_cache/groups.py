"""Groups of layers that need the same blocks of a text: all of them, or those that a window still reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from engine.kv_cache.block_pool import NULL_BLOCK, BlockPool
from engine.types import Sequence

HASHES_AT_ONCE = 64  # blocks that a look-up hashes ahead of what it knows: beyond the first that is missing, in vain

Digests = Callable[[int], list[bytes]]  # of a text's full blocks: of so many of them, or of more


class KVCacheGroup(ABC):
    """Layers of one kind. A block of the group holds `block_size` tokens' keys and values in these layers.

    Groups share a pool, whose blocks are all of one size; a block is of the group that has taken it. Only the manager
    calls a group, which reads and writes its own part of a sequence: `block_tables[index]` and
    `num_released_blocks[index]`.
    """

    window: int | None = None  # tokens that a layer sees, the newest included; None: all

    def __init__(self, index: int, pool: BlockPool, block_size: int) -> None:
        """index: `AttentionLayer.group` of its layers"""
        self.index, self.pool, self.block_size = index, pool, block_size
        self._suffix = bytes([index]) if index else b""

    def key(self, digest: bytes) -> bytes:
        """By which the pool knows the group's block of a text that has this digest."""
        return digest + self._suffix if self._suffix else digest

    @abstractmethod
    def find_prefix(self, digests: Digests, num_blocks: int) -> list[int]:
        """The longest beginning of a text, of at most so many blocks, after which a token finds all that it sees.

        Takes no reference.
        """

    @abstractmethod
    def release(self, seq: Sequence) -> None:
        """Frees what no later token of the sequence sees, and leaves null blocks in its place."""

    def num_columns(self, num_tokens: int, num_released: int, span: int) -> int:
        """Blocks of a table, the released ones among them, with which a text may grow to `num_tokens` tokens.

        span: as of `most_blocks`
        """
        return _num_columns(self.window, num_tokens, num_released, span, self.block_size)

    def num_new_blocks(self, num_columns: int, prefix: list[int]) -> int:
        """Free blocks that a table of so many columns takes which starts from a prefix."""
        owners = list(map(self.pool.ref_counts.__getitem__, prefix))
        num_free = owners.count(0) - prefix.count(NULL_BLOCK)
        return max(num_columns - len(prefix), 0) + num_free

    def start(self, seq: Sequence, prefix: list[int]) -> None:
        """Points a sequence that owns nothing in this group, the next of its tables, at the blocks of a prefix."""
        for block in prefix:
            if block != NULL_BLOCK:
                self.pool.share(block)
        seq.block_tables.append(list(prefix))
        seq.num_released_blocks[self.index] = prefix.count(NULL_BLOCK)

    def commit(self, seq: Sequence, digests: list[bytes], num_full: int) -> None:
        """Offers the blocks up to `num_full` that the prefix cache does not know yet to other sequences."""
        table = seq.block_tables[self.index]
        for i in range(max(seq.num_committed_blocks, seq.num_released_blocks[self.index]), num_full):
            self.pool.cache(table[i], self.key(digests[i]))

    def uncache(self, digests: list[bytes]) -> None:
        for digest in digests:
            self.pool.uncache(self.key(digest))

    def free(self, seq: Sequence) -> None:
        for block in reversed(seq.block_tables[self.index]):  # the tail of a prefix is evicted first
            if block != NULL_BLOCK:
                self.pool.free(block)


class FullAttentionGroup(KVCacheGroup):
    """Layers that see the whole text: its blocks stay, and a prefix is known up to the first block that is not."""

    def find_prefix(self, digests: Digests, num_blocks: int) -> list[int]:
        blocks: list[int] = []
        while (start := len(blocks)) < num_blocks:
            stop = min(start + HASHES_AT_ONCE, num_blocks)
            for block in map(self.pool.block_of.get, map(self.key, digests(stop)[start:stop])):
                if block is None:
                    return blocks
                blocks.append(block)
        return blocks

    def release(self, seq: Sequence) -> None:
        pass


class WindowGroup(KVCacheGroup):
    """Layers with a sliding window: what it has passed is free again, and null blocks stand for it."""

    def __init__(self, index: int, pool: BlockPool, block_size: int, *, window: int) -> None:
        super().__init__(index, pool, block_size)
        self.window: int = window

    def find_prefix(self, digests: Digests, num_blocks: int) -> list[int]:
        """From the right, in one pass: a block that is missing ends every prefix that would need it."""
        known = digests(num_blocks)
        index = num_blocks
        found: list[int] = []  # of the prefix, from its end
        while index > self._first_seen_block(num_blocks * self.block_size):
            index -= 1
            block = self.pool.lookup(self.key(known[index]))
            if block is None:
                num_blocks, found = index, []
            else:
                found.append(block)
        return [NULL_BLOCK] * (num_blocks - len(found)) + found[::-1]

    def release(self, seq: Sequence) -> None:
        table, first = seq.block_tables[self.index], seq.num_released_blocks[self.index]
        end = min(self._first_seen_block(seq.num_computed_tokens), len(table))
        for i in range(first, end):
            self.pool.free(table[i])
            table[i] = NULL_BLOCK
            seq.num_released_blocks[self.index] = i + 1

    def _first_seen_block(self, position: int) -> int:
        """The first block of which a token at this position sees anything."""
        return max(position - self.window + 1, 0) // self.block_size


def most_blocks(windows: Iterable[int | None], num_tokens: int, *, span: int, block_size: int) -> int:
    """Blocks that a sequence of `num_tokens` tokens owns at once, at most, in groups with these windows.

    span: tokens that are stored before the blocks behind a window are released, at most: see `span_of_step`
    """
    return sum(_num_columns(window, num_tokens, 0, span, block_size) for window in windows)


def span_of_step(max_num_batched_tokens: int, block_size: int, num_lookahead_tokens: int) -> int:
    """Tokens that a sequence holds past a window, at most: a step's, and parts of the blocks at both ends."""
    return max_num_batched_tokens + 2 * block_size + num_lookahead_tokens


def _num_columns(window: int | None, num_tokens: int, num_released: int, span: int, block_size: int) -> int:
    if window is not None:
        num_tokens = min(num_tokens, num_released * block_size + window + span)
    return -(-num_tokens // block_size)


def make_groups(windows: list[int | None], pool: BlockPool, block_size: int) -> list[KVCacheGroup]:
    """windows: of each group; None where its layers see the whole text"""
    return [
        FullAttentionGroup(index, pool, block_size)
        if window is None
        else WindowGroup(index, pool, block_size, window=window)
        for index, window in enumerate(windows)
    ]
