"""Which KV blocks are owned, cached or free. Block ids only; no tensors here."""

from __future__ import annotations

from collections import OrderedDict

NULL_BLOCK = 0  # stands in a block table where a sliding window freed a block; never handed out


class BlockPool:
    """Reference-counted blocks with an LRU of free ones.

    A free block keeps its contents (and its hash) until it is handed out again, so the free list is also the prefix
    cache's eviction queue.
    """

    def __init__(self, num_blocks: int) -> None:
        """num_blocks: all blocks of the KV cache, the null block included."""
        if num_blocks < 2:
            raise ValueError(f"the KV cache needs at least 2 blocks (one is reserved), got {num_blocks}")
        self.num_blocks = num_blocks - 1
        self.num_cached_free = 0  # free blocks that still hold a reusable prefix
        self.num_reuse_gains = 0  # how often a block became both owned and found by its hash: sharing it takes no room
        self.ref_counts = [0] * num_blocks
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self.free_blocks)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - len(self.free_blocks)

    def allocate(self) -> int:
        """Takes the least recently freed block and forgets what it cached."""
        block, _ = self.free_blocks.popitem(last=False)
        block_hash = self.hash_of.pop(block, None)
        if block_hash is not None:
            del self.block_of[block_hash]
            self.num_cached_free -= 1
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Takes one more reference to a cached block."""
        if self.ref_counts[block] == 0:
            del self.free_blocks[block]
            self.num_cached_free -= 1
            self.num_reuse_gains += 1
        self.ref_counts[block] += 1

    def free(self, block: int) -> None:
        self.ref_counts[block] -= 1
        assert self.ref_counts[block] >= 0, f"block {block} was freed twice"
        if self.ref_counts[block] > 0:
            return
        self.free_blocks[block] = None
        if block in self.hash_of:
            self.num_cached_free += 1
        else:  # nothing worth keeping: reuse it first
            self.free_blocks.move_to_end(block, last=False)

    def cache(self, block: int, block_hash: bytes) -> None:
        """Remembers a full block by the hash of every token up to its end. The first block with a hash keeps it."""
        if block_hash not in self.block_of and block not in self.hash_of:
            self.hash_of[block] = block_hash
            self.block_of[block_hash] = block
            self.num_reuse_gains += 1

    def uncache(self, block_hash: bytes) -> None:
        """Forgets what a hash stands for, if it is known. Whoever owns the block keeps it."""
        block = self.block_of.pop(block_hash, None)
        if block is None:
            return
        del self.hash_of[block]
        if self.ref_counts[block] == 0:
            self.num_cached_free -= 1
            self.free_blocks.move_to_end(block, last=False)

    def lookup(self, block_hash: bytes) -> int | None:
        return self.block_of.get(block_hash)
