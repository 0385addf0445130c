"""What the tests of attention back ends share: sequences of a batch, and the definition in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from engine.batch.forward_batch import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.reference.attention import paged_attention


@dataclass
class Item:
    """A sequence of a batch: tokens computed before, tokens of this step, and the parents of the drafts among them."""

    num_computed: int
    num_new: int
    draft_parents: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.num_computed + self.num_new


def scheduled(item: Item, block_table: list[int]) -> Scheduled:
    num_drafts = len(item.draft_parents)
    token_ids = [1] * (item.num_tokens - num_drafts)
    params = SamplingParams(seed=0, max_tokens=1)
    seq = Sequence(Request(request_id="a", prompt_token_ids=token_ids, params=params), token_ids)
    seq.draft_token_ids, seq.draft_parents = [1] * num_drafts, list(item.draft_parents)
    seq.num_computed_tokens, seq.block_table = item.num_computed, block_table
    return Scheduled(seq, item.num_new, num_drafts, samples=True)


def released(item: Item, table: list[int], *, window: int | None, block_size: int) -> list[int]:
    """The block table after a sliding window freed the blocks that it left."""
    if window is None:
        return table
    num_free = max(0, item.num_computed - window + 1) // block_size
    return [0] * num_free + table[num_free:]


def random_item(rng: random.Random, num_computed: int, *, most: int, trees: bool) -> Item:
    """A decoding row, a chunk of fewer than `most` tokens, or a few drafts."""
    kind = rng.choice(["decode", "drafts", "chunk"])
    if kind == "decode":
        return Item(num_computed, 1)
    if kind == "chunk":
        return Item(num_computed, rng.randrange(2, most))
    num_drafts = rng.randrange(1, 9)
    parents = tuple(rng.randrange(-1, i) if trees else i - 1 for i in range(num_drafts))
    return Item(num_computed, num_drafts + rng.randrange(1, 3), parents)


def attend_in_float64(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
    """By the definition, from what is in a cache. k, v: [num_kv_heads, num_blocks, block_size, head_dim]"""
    return paged_attention(
        q.double(), k.double(), v.double(), batch.block_tables, batch.query_starts, batch.seq_lens, layer.scale,
        window=layer.window, soft_cap=layer.soft_cap, tree_mask=batch.tree_mask, positions=batch.positions,
    )  # fmt: skip
