"""The prompts that are being computed in a step, so that nobody computes the same prefix beside them."""

from __future__ import annotations

from collections.abc import Iterable

from engine.kv_cache.groups import HASHES_AT_ONCE
from engine.kv_cache.manager import KVCacheManager, Prefix
from engine.types import Sequence


class PromptsInProgress:
    """The running sequences that have prompt blocks to fill. Make one per step."""

    def __init__(self, kv: KVCacheManager, computing: Iterable[Sequence]) -> None:
        self._kv = kv
        self._by_first_block: dict[bytes, list[Sequence]] = {}  # few have a beginning in common
        for seq in computing:
            self.add(seq)

    def add(self, seq: Sequence) -> None:
        if self._kv.prefix_caching and seq.num_prompt_tokens >= self._kv.block_size:
            self._by_first_block.setdefault(self._kv.hashes(seq, 1)[0], []).append(seq)

    def have_next_block(self, seq: Sequence, prefix: Prefix) -> bool:
        """Whether one of them will compute the block of `seq` that follows its cached prefix."""
        kv, block = self._kv, len(prefix[0])
        if not self._by_first_block or not kv.can_share_prefix(seq) or block >= (seq.num_tokens - 1) // kv.block_size:
            return False
        wanted = kv.hashes(seq, block + 1)[block]
        for other in self._by_first_block.get(kv.hashes(seq, 1)[0], ()):
            is_to_come = other.num_committed_blocks <= block < other.num_prompt_tokens // kv.block_size
            is_near = block < len(other.block_hashes) + HASHES_AT_ONCE  # else it takes long to get there, and to hash
            if is_to_come and is_near and kv.hashes(other, block + 1)[block] == wanted:
                return True
        return False
