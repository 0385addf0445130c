"""Gives sequences their KV blocks and finds prefixes that are already computed."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from functools import partial
from hashlib import blake2b

import numpy as np

from engine.kv_cache.block_pool import NULL_BLOCK, BlockPool
from engine.kv_cache.groups import Digests, make_groups, most_blocks
from engine.types import Sequence

Prefix = list[list[int]]  # blocks of each group, all of one length


class KVCacheManager:
    """Owns every block table: one per sequence and group of layers (`KVCacheGroup`), all groups' blocks in one pool.

    Prefixes are found by a hash chain over full blocks: a 128-bit digest of the parent's digest and the block's
    tokens, rooted in what else changes the KV (`cache_key`: model, dtype, codec) and the request's salt. A prefix is
    known as far as every group has what the token behind it sees.

    num_blocks: blocks of the pool, the reserved null block included.
    windows: of each group of layers; None where they see the whole context.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        windows: Listing[int | None] = (None,),
        cache_key: str = "",
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.groups = make_groups(list(windows), self.pool, block_size)
        self.cache_key = cache_key
        self.has_windows = any(window is not None for window in windows)

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill in each group."""
        return -(-num_tokens // self.block_size)

    def can_share_prefix(self, seq: Sequence) -> bool:
        """Whether it may start from cached blocks: not where hidden states of all its prompt are wanted."""
        return self.prefix_caching and not needs_prompt_scores(seq) and seq.request.pooling != "mean"

    def find_prefix(self, seq: Sequence, *, max_num_hashes: int | None = None) -> Prefix | None:
        """The cached blocks of the sequence's longest known prefix; takes no reference.

        At least one token stays uncomputed: its logits are what we sample from. A request that wants the
        log-probabilities of its prompt recomputes all of it. In a group with a window, null blocks stand for what lies
        behind it: nobody will look at it again.

        max_num_hashes: blocks that are hashed, at most. Where more would be needed, the answer is None, and the next
        call begins where this one stopped.
        """
        prefix: Prefix = [[] for _ in self.groups]
        if not self.can_share_prefix(seq):
            return prefix
        num_blocks = length = (seq.num_tokens - 1) // self.block_size
        if max_num_hashes is not None:
            length = min(num_blocks, len(seq.block_hashes) + max_num_hashes)
        digests = partial(self.hashes, seq)
        is_cut = length < num_blocks
        for group in self.groups:
            if group.window is None:  # first those that hash no more than they find
                prefix[group.index] = group.find_prefix(digests, length)
                is_cut = is_cut and len(prefix[group.index]) == length
                length = len(prefix[group.index])
        if is_cut:
            digests(length)
            return None
        return self._find_common(prefix, digests, length)

    def _find_common(self, prefix: Prefix, digests: Digests, length: int) -> Prefix:
        """Shortens what full attention has until every window has it too: a window's is not always a part of a longer
        one."""
        windows = [group for group in self.groups if group.window is not None]
        while any(len(prefix[group.index]) != length for group in windows):
            for group in windows:
                prefix[group.index] = group.find_prefix(digests, length)
                length = len(prefix[group.index])
        return [blocks[:length] for blocks in prefix]

    def num_blocks_at_most(self, num_tokens: int, span: int) -> int:
        """Blocks that a sequence owns at once, at most, until it has `num_tokens` tokens. span: as of `num_columns`"""
        return most_blocks((group.window for group in self.groups), num_tokens, span=span, block_size=self.block_size)

    def num_blocks_to_start(self, prefix: Prefix, num_tokens: int, span: int) -> int:
        """Free blocks that a sequence takes if it starts from `prefix` and grows to `num_tokens` tokens."""
        num_blocks = 0
        for group, blocks in zip(self.groups, prefix, strict=True):
            num_columns = group.num_columns(num_tokens, blocks.count(NULL_BLOCK), span)
            num_blocks += group.num_new_blocks(num_columns, blocks)
        return num_blocks

    def num_blocks_to_grow(self, seq: Sequence, num_tokens: int, span: int) -> int:
        """Free blocks that a running sequence takes if it grows to `num_tokens` tokens."""
        num_blocks, num_columns = 0, len(seq.block_tables[0])
        for group, num_released in zip(self.groups, seq.num_released_blocks, strict=True):
            num_blocks += max(group.num_columns(num_tokens, num_released, span) - num_columns, 0)
        return num_blocks

    def max_num_spared_blocks(self, num_gains_before: int) -> int | None:
        """By how many `num_blocks_to_start` of any sequence can have shrunk since `pool.num_reuse_gains` was this.

        None: by any number, as a window's prefix is found by its end, and then spares all that lies before it.
        """
        return None if self.has_windows else self.pool.num_reuse_gains - num_gains_before

    def num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """Free blocks that the sequence's tables lack to hold `num_tokens` tokens."""
        return max(self.num_blocks_for(num_tokens) - len(seq.block_tables[0]), 0) * len(self.groups)

    def start(self, seq: Sequence, prefix: Prefix) -> None:
        """Points a sequence that owns nothing at the blocks that `find_prefix` found."""
        assert not seq.block_tables, f"{seq.request.request_id} owns blocks already"
        seq.num_released_blocks = [0] * len(self.groups)
        for group, blocks in zip(self.groups, prefix, strict=True):
            group.start(seq, blocks)
        seq.num_committed_blocks = len(prefix[0])
        seq.num_computed_tokens = len(prefix[0]) * self.block_size

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Grows the block tables to hold `num_tokens` tokens. All or nothing."""
        if not seq.block_tables:
            seq.block_tables, seq.num_released_blocks = [[] for _ in self.groups], [0] * len(self.groups)
        num_columns = len(seq.block_tables[0])
        if num_tokens <= num_columns * self.block_size:
            return True
        num_needed = self.num_blocks_for(num_tokens) - num_columns
        if num_needed * len(self.groups) > self.pool.num_free:
            return False
        for table in seq.block_tables:
            table.extend(self.pool.allocate() for _ in range(num_needed))
        return True

    def allocate_all(self, sizes: Iterable[tuple[Sequence, int]]) -> bool:
        """Grows the tables of each sequence to hold so many tokens, of all of them or of none."""
        ends = list(sizes)
        if sum(self.num_missing_blocks(seq, num_tokens) for seq, num_tokens in ends) > self.pool.num_free:
            return False
        for seq, num_tokens in ends:
            self.allocate(seq, num_tokens)
        return True

    def give_back(self, seq: Sequence, num_tokens: int) -> None:
        """Shrinks the block tables to what `num_tokens` tokens need, all that are computed and verified among them."""
        num_columns = self.num_blocks_for(num_tokens)
        if not seq.block_tables or num_columns >= len(seq.block_tables[0]):
            return
        unused = [block for table in seq.block_tables for block in table[num_columns:]]
        # other lists: who keeps a copy reads them anew
        seq.block_tables = [table[:num_columns] for table in seq.block_tables]
        for block in unused:
            self.pool.free(block)

    def commit(self, seq: Sequence) -> None:
        """Offers the sequence's full, verified blocks to other sequences, and frees what its windows left behind."""
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if num_full > seq.num_committed_blocks and self.prefix_caching:
            hashes = self.hashes(seq, num_full)
            for group in self.groups:
                group.commit(seq, hashes, num_full)
            seq.num_committed_blocks = num_full
        if self.has_windows:
            for group in self.groups:
                group.release(seq)

    def uncache(self, seq: Sequence) -> None:
        """Takes the sequence's text out of the prefix cache, as its keys and values are not to be trusted.

        All of it: what it committed before it was preempted is not in its block table now, but may be found again.
        """
        if self.prefix_caching:
            hashes = self.hashes(seq, seq.num_tokens // self.block_size)
            for group in self.groups:
                group.uncache(hashes)

    def free(self, seq: Sequence) -> None:
        if seq.block_tables:
            for group in self.groups:
                group.free(seq)
        seq.block_tables, seq.num_released_blocks = [], [0] * len(self.groups)
        seq.num_committed_blocks = seq.num_computed_tokens = 0

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


def needs_prompt_scores(seq: Sequence) -> bool:
    """Whether log-probabilities of prompt tokens are still to be computed."""
    return seq.params.prompt_logprobs is not None and seq.num_scored_tokens < seq.num_prompt_tokens - 1
