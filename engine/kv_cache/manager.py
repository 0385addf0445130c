"""Gives sequences their KV blocks and finds prefixes that are already computed."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from engine.kv_cache.block_pool import NULL_BLOCK, BlockPool
from engine.types import Sequence

HASHES_AT_ONCE = 64  # blocks that a look-up hashes ahead of what it knows: beyond the first that is missing, in vain


class KVCacheManager:
    """Owns every block table.

    Prefixes are found by a hash chain over full blocks: a 128-bit digest of the parent's digest and the block's
    tokens, rooted in what else changes the KV (`cache_key`: model, dtype) and the request's salt.

    num_blocks: blocks in the KV cache, the reserved null block included.
    window: every attention layer's sliding window in tokens, or None if a layer sees the whole context.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        window: int | None = None,
        cache_key: str = "",
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self.cache_key = cache_key

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_share_prefix(self, seq: Sequence) -> bool:
        return self.prefix_caching and not needs_prompt_scores(seq)

    def find_prefix(self, seq: Sequence, *, max_num_hashes: int | None = None) -> list[int] | None:
        """The cached blocks of the sequence's longest known prefix; takes no reference.

        At least one token stays uncomputed: its logits are what we sample from. A request that wants the
        log-probabilities of its prompt recomputes all of it. With a window, null blocks stand for what lies behind it:
        nobody will look at it again.

        max_num_hashes: blocks that are hashed, at most. Where more would be needed, the answer is None, and the next
        call begins where this one stopped.
        """
        if not self.can_share_prefix(seq):
            return []
        num_blocks = end = (seq.num_tokens - 1) // self.block_size
        if max_num_hashes is not None:
            end = min(num_blocks, len(seq.block_hashes) + max_num_hashes)
        if self.window is not None:
            hashes = self.hashes(seq, end)[:end]
            return self._find_last_window(hashes) if end == num_blocks else None
        blocks: list[int] = []
        while (start := len(blocks)) < end:
            stop = min(start + HASHES_AT_ONCE, end)
            for block in map(self.pool.block_of.get, self.hashes(seq, stop)[start:stop]):
                if block is None:
                    return blocks
                blocks.append(block)
        return blocks if end == num_blocks else None

    def _find_last_window(self, hashes: list[bytes]) -> list[int]:
        """The longest prefix of which all blocks are cached that the token behind it can see.

        From the right, in one pass: a block that is missing ends every prefix that would need it.
        """
        num_blocks = index = len(hashes)
        found: list[int] = []  # of the prefix, from its end
        while index > self._first_seen_block(num_blocks * self.block_size):
            index -= 1
            block = self.pool.lookup(hashes[index])
            if block is None:
                num_blocks, found = index, []
            else:
                found.append(block)
        return [NULL_BLOCK] * (num_blocks - len(found)) + found[::-1]

    def _first_seen_block(self, position: int) -> int:
        """The first block of which a token at this position sees anything."""
        assert self.window is not None
        return max(position - self.window + 1, 0) // self.block_size

    def num_new_blocks(self, seq: Sequence, num_tokens: int, prefix: list[int]) -> int:
        """Free blocks that `seq` takes if it starts from `prefix` and grows to `num_tokens` tokens."""
        owners = list(map(self.pool.ref_counts.__getitem__, prefix))
        num_free = owners.count(0) - prefix.count(NULL_BLOCK)
        return self.num_blocks_for(num_tokens) - len(prefix) + num_free

    def max_num_spared_blocks(self, num_gains_before: int) -> int | None:
        """By how many `num_new_blocks` of any sequence can have shrunk since `pool.num_reuse_gains` was what is given.

        None: by any number, as a window's prefix is found by its end, and then spares all that lies before it.
        """
        return None if self.window is not None else self.pool.num_reuse_gains - num_gains_before

    def start(self, seq: Sequence, prefix: list[int]) -> None:
        """Points a sequence that owns nothing at the blocks that `find_prefix` found."""
        assert not seq.block_table, f"{seq.request.request_id} owns blocks already"
        for block in prefix:
            if block != NULL_BLOCK:
                self.pool.share(block)
        seq.block_table = list(prefix)
        seq.num_committed_blocks = len(prefix)
        seq.num_released_blocks = prefix.count(NULL_BLOCK)
        seq.num_computed_tokens = len(prefix) * self.block_size

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Grows the block table to hold `num_tokens` tokens. All or nothing."""
        if num_tokens <= len(seq.block_table) * self.block_size:
            return True
        num_needed = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_needed > self.pool.num_free:
            return False
        seq.block_table.extend(self.pool.allocate() for _ in range(num_needed))
        return True

    def give_back(self, seq: Sequence, num_tokens: int) -> None:
        """Shrinks the block table to what `num_tokens` tokens need, all that are computed and verified among them."""
        num_blocks = self.num_blocks_for(num_tokens)
        unused = seq.block_table[num_blocks:]
        if not unused:
            return
        seq.block_table = seq.block_table[:num_blocks]  # another list: who keeps a copy reads it anew
        for block in unused:
            self.pool.free(block)

    def commit(self, seq: Sequence) -> None:
        """Offers the sequence's full, verified blocks to other sequences, and frees what its window left behind."""
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if num_full > seq.num_committed_blocks and self.prefix_caching:
            hashes = self.hashes(seq, num_full)
            for i in range(max(seq.num_committed_blocks, seq.num_released_blocks), num_full):
                self.pool.cache(seq.block_table[i], hashes[i])
            seq.num_committed_blocks = num_full
        if self.window is not None:
            self._release_behind_window(seq)

    def uncache(self, seq: Sequence) -> None:
        """Takes the sequence's text out of the prefix cache, as its keys and values are not to be trusted.

        All of it: what it committed before it was preempted is not in its block table now, but may be found again.
        """
        for block_hash in self.hashes(seq, seq.num_tokens // self.block_size) if self.prefix_caching else []:
            self.pool.uncache(block_hash)

    def free(self, seq: Sequence) -> None:
        for block in reversed(seq.block_table):  # the tail of a prefix is evicted first
            if block != NULL_BLOCK:
                self.pool.free(block)
        seq.block_table = []
        seq.num_committed_blocks = seq.num_released_blocks = 0
        seq.num_computed_tokens = 0

    def hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """The digests of the sequence's full blocks, of so many of them or of more: each is made once."""
        size, known = self.block_size, seq.block_hashes
        first = len(known)
        if num_blocks <= first:
            return known
        assert num_blocks <= seq.num_tokens // size, f"block {num_blocks - 1} is not full"
        digest = known[-1] if known else self._root(seq.request.cache_salt)
        data = np.array(seq.token_ids[first * size : num_blocks * size], dtype=np.int32).tobytes()
        for start in range(0, len(data), 4 * size):
            digest = blake2b(digest + data[start : start + 4 * size], digest_size=16).digest()
            known.append(digest)
        return known

    def _root(self, salt: str) -> bytes:
        return blake2b(f"{self.cache_key}\0{salt}".encode(), digest_size=16).digest()

    def _release_behind_window(self, seq: Sequence) -> None:
        end = min(self._first_seen_block(seq.num_computed_tokens), len(seq.block_table))
        for i in range(seq.num_released_blocks, end):
            self.pool.free(seq.block_table[i])
            seq.block_table[i] = NULL_BLOCK
            seq.num_released_blocks = i + 1


def needs_prompt_scores(seq: Sequence) -> bool:
    """Whether log-probabilities of prompt tokens are still to be computed."""
    return seq.params.prompt_logprobs is not None and seq.num_scored_tokens < seq.num_prompt_tokens - 1
