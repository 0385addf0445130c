"""Texts with made-up queries, keys and values, and the definition of attention over them, in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.codec import DenseCodec, KVCodec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.scaled_codec import ScaledCodec
from engine.kv_cache.storage import KVCache
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.reference.attention import visible
from kernels.reference.kv_codes import LARGEST_CODE, decode, encode
from tests.support.stepping import build_forward_batch


@dataclass(frozen=True)
class Part:
    """What one step computes of a text: tokens computed before, tokens of this step, parents of the drafts in these."""

    num_computed: int
    num_new: int
    draft_parents: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.num_computed + self.num_new


def random_part(rng: random.Random, num_computed: int, *, most: int, trees: bool) -> Part:
    """A decoding row, a chunk of fewer than `most` tokens, or a few drafts behind one or two tokens."""
    kind = rng.choice(["decode", "drafts", "chunk"])
    if kind == "decode":
        return Part(num_computed, 1)
    if kind == "chunk":
        return Part(num_computed, rng.randrange(2, most))
    num_drafts = rng.randrange(1, 9)
    parents = tuple(rng.randrange(-1, i) if trees else i - 1 for i in range(num_drafts))
    return Part(num_computed, num_drafts + rng.randrange(1, 3), parents)


def random_parts(rng: random.Random, lengths: list[int], *, most: int) -> list[dict[int, Part]]:
    """Steps that compute texts of these lengths: chunks, single tokens and chains of drafts, in mixed batches."""
    done, steps = [0] * len(lengths), []
    while unfinished := [i for i, length in enumerate(lengths) if done[i] < length]:
        step = {}
        for i in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            num_new = min(lengths[i] - done[i], rng.choice([1, rng.randint(2, 5), rng.randint(1, most)]))
            num_drafts = rng.randrange(num_new) if rng.random() < 0.5 else 0
            step[i] = Part(done[i], num_new, tuple(range(-1, num_drafts - 1)))
            done[i] += num_new
        steps.append(step)
    return steps


def scheduled(part: Part, block_table: list[int]) -> Scheduled:
    num_drafts = len(part.draft_parents)
    token_ids = [1] * (part.num_tokens - num_drafts)
    params = SamplingParams(seed=0, max_tokens=1)
    seq = Sequence(Request(request_id="a", prompt_token_ids=token_ids, params=params), token_ids)
    seq.draft_token_ids, seq.draft_parents = [1] * num_drafts, list(part.draft_parents)
    seq.num_computed_tokens, seq.block_tables = part.num_computed, [block_table]
    return Scheduled(seq, part.num_new, num_drafts, samples=True)


def released(part: Part, table: list[int], *, window: int | None, block_size: int) -> list[int]:
    """The block table after a sliding window freed the blocks that it left."""
    if window is None:
        return table
    num_free = max(0, part.num_computed - window + 1) // block_size
    return [0] * num_free + table[num_free:]


class Texts:
    """Queries, keys and values of texts of these lengths in one layer, and a place for each text in a cache's blocks.

    Block 0 is nobody's: it stands where a window freed one.
    """

    def __init__(
        self, layer: AttentionLayer, lengths: list[int], *, block_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layer, self.block_size = layer, block_size
        self.q = [torch.randn(length, layer.num_heads, layer.head_dim).to(dtype) for length in lengths]
        self.k, self.v = (
            [torch.randn(length, layer.num_kv_heads, layer.head_dim).to(dtype) for length in lengths] for _ in range(2)
        )
        sizes = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(sizes) + 2
        free = torch.randperm(self.num_blocks - 1).add(1).tolist()
        self.tables = [[free.pop() for _ in range(size)] for size in sizes]

    def batch(self, step: Mapping[int, Part], device: torch.device) -> ForwardBatch:
        sizes = {"window": self.layer.window, "block_size": self.block_size}
        items = [scheduled(part, released(part, self.tables[index], **sizes)) for index, part in step.items()]
        return build_forward_batch(items, self.block_size, device)

    def rows(self, step: Mapping[int, Part], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The step's queries, keys and values."""
        q, k, v = (
            torch.cat([x[index][part.num_computed : part.num_tokens] for index, part in step.items()]).to(device)
            for x in (self.q, self.k, self.v)
        )
        return q, k, v

    def define(self, index: int, part: Part, *, kept_as: torch.dtype) -> Tensor:
        """What the part's rows are by the definition. kept_as: what the cache keeps keys and values as"""
        rows = slice(part.num_computed, part.num_tokens)
        k, v = (kept(x[index][: part.num_tokens], kept_as) for x in (self.k, self.v))
        return attend_densely(self.q[index][rows], k, v, self.layer, part)


def codec_of(dtype: torch.dtype, *, keys_as_columns: bool = False) -> KVCodec:
    """What keeps elements of this type."""
    return (ScaledCodec if dtype in LARGEST_CODE else DenseCodec)(dtype, keys_as_columns)


def kept(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of this type has them."""
    return decode(*encode(tokens, dtype)) if dtype in LARGEST_CODE else tokens.to(dtype)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, part: Part) -> Tensor:
    """The definition, over keys and values that lie in order. k, v: [part.num_tokens, num_kv_heads, head_dim]"""
    group = layer.num_heads // layer.num_kv_heads
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * layer.scale
    if layer.soft_cap is not None:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    mask, positions = tree_of(part)
    sees = visible(part.num_new, part.num_tokens, layer.window, mask, positions)
    return (scores.masked_fill(~sees, -math.inf).softmax(-1) @ v).transpose(0, 1)


def tree_of(part: Part) -> tuple[Tensor, Tensor]:
    """Which of a part's rows each of them sees, and their positions: a draft sees its ancestors, and is one further
    than its parent. [num_new, num_new] bool, [num_new]"""
    num_drafts = len(part.draft_parents)
    root = part.num_new - num_drafts - 1
    mask = torch.ones(part.num_new, part.num_new, dtype=torch.bool).tril()
    positions = torch.arange(part.num_computed, part.num_tokens)
    for draft, parent in enumerate(part.draft_parents):
        row, above = root + 1 + draft, root + 1 + parent
        mask[row] = mask[above]
        mask[row, row] = True
        positions[row] = positions[above] + 1
    return mask, positions


def spoil(cache: KVCache) -> None:
    """Writes into all of the cache what no result may show."""
    cache.blocks.fill_(0xFF)  # NaN in every format
