"""A paged cache with random keys and values, and one step's batch over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

import kernels.reference.attention
from kernels.reference.kv_codes import encode
from kernels.triton.attention.paged_attention import Prepared, paged_attention
from kernels.triton.attention.work_partition import Workspace, partition_any_lengths, partition_attention
from kernels.triton.configs import AttentionConfig, attention_config, chip_of

BLOCK_SIZE = 16
Lens = list[tuple[int, int]]  # new tokens and all tokens of each sequence


class Options(TypedDict, total=False):
    """What the reference `paged_attention` takes beside tensors."""

    window: int
    soft_cap: float
    sinks: Tensor
    tree_mask: Tensor
    positions: Tensor
    k_scales: Tensor
    v_scales: Tensor


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"


@dataclass(frozen=True)
class AttentionCase:
    """Tensors as the reference `paged_attention` takes them."""

    heads: Heads
    lens: Lens
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    options: Options

    @property
    def scale(self) -> float:
        return float(self.heads.head_dim**-0.5)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k_cache, self.v_cache, self.block_tables, self.query_starts, self.seq_lens

    @property
    def num_bytes(self) -> int:
        """Keys and values of all contexts, read once, with the queries and the output."""
        num_tokens = sum(length for _, length in self.lens)
        of_token = self.heads.head_dim * self.k_cache.element_size() + (4 if self.has_codes else 0)
        kv = 2 * num_tokens * self.heads.num_kv_heads * of_token
        return kv + 2 * self.q.numel() * self.q.element_size()

    @property
    def has_codes(self) -> bool:
        """Whether keys and values have 8 bits, and scales."""
        return self.k_cache.element_size() == 1

    @property
    def num_flops(self) -> int:
        num_pairs = sum(new * length - new * (new - 1) // 2 for new, length in self.lens)
        return 4 * num_pairs * self.heads.num_heads * self.heads.head_dim

    def prepare(self, config: AttentionConfig | None = None) -> Prepared:
        """Prepares the calls, as the engine does once per step. config: by default that of this chip's table."""
        device, dtype = self.q.device, self.q.dtype
        if config is None:
            heads = self.heads.head_dim, self.heads.group
            config = attention_config(*heads, dtype, chip=chip_of(device), has_codes=self.has_codes)
        partition = partition_attention(
            self.query_starts.diff().cpu().numpy(),
            self.seq_lens.cpu().numpy(),
            group=self.heads.group,
            num_kv_heads=self.heads.num_kv_heads,
            config=config,
            device=device,
        )
        return Prepared(partition, config, Workspace(0, 0, device))

    def prepare_any_lengths(self) -> Prepared:
        """As `prepare`, with the partition of a CUDA graph (graph-safe). All sequences have as many rows."""
        ((num_rows, _), *_), longest = self.lens, max(length for _, length in self.lens)
        prepared = self.prepare()
        num_splits = sum(-(-length // prepared.config.split_size) for _, length in self.lens)
        partition = partition_any_lengths(
            len(self.lens),
            num_rows,
            max_context=2 * longest,
            num_partials=num_rows * num_splits,
            group=self.heads.group,
            num_kv_heads=self.heads.num_kv_heads,
            config=prepared.config,
            device=self.q.device,
        )
        return Prepared(partition.at(self.seq_lens), prepared.config, prepared.workspace)

    def run(self, prepared: Prepared) -> Tensor:
        return paged_attention(*self.tensors, self.scale, **self.options, prepared=prepared)

    def expected(self) -> Tensor:
        """The result by the definition, in float64."""
        options = self.options.copy()
        if "sinks" in options:
            options["sinks"] = options["sinks"].double()
        with torch.device(self.q.device):  # where the definition makes its masks
            return kernels.reference.attention.paged_attention(
                self.q.double(), *self.tensors[1:], self.scale, **options
            )


def make_case(
    heads: Heads,
    lens: Lens,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    codes: torch.dtype | None = None,
    **options: Unpack[Options],
) -> AttentionCase:
    """A case of random values. Blocks are in random order, and slots without a token hold NaN.

    codes: of a cache of 8 bits
    """
    device = generator.device
    num_each = [-(-length // BLOCK_SIZE) for _, length in lens]
    num_blocks = sum(num_each) + 1
    order = torch.randperm(num_blocks, device=device, generator=generator)
    block_tables = torch.zeros(len(lens), max(num_each), dtype=torch.int64, device=device)
    is_used = torch.zeros(num_blocks, BLOCK_SIZE, dtype=torch.bool, device=device)
    first = 0
    for row, (num, (_, length)) in enumerate(zip(num_each, lens, strict=True)):
        blocks = block_tables[row, :num] = order[first : first + num]
        is_used[blocks] = True
        is_used[blocks[-1], (length - 1) % BLOCK_SIZE + 1 :] = False
        first += num
    shape = (num_blocks, heads.num_kv_heads, 2, BLOCK_SIZE, heads.head_dim)
    cache = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    cache.permute(0, 3, 1, 2, 4)[~is_used] = torch.nan
    if codes is not None:
        cache, scales = _with_scales(cache, codes)
        options = {**options, "k_scales": scales[:, :, 0], "v_scales": scales[:, :, 1]}
    num_new = torch.tensor([new for new, _ in lens], device=device)
    query_starts = torch.cat((num_new.new_zeros(1), num_new.cumsum(0)))
    q = torch.empty(int(num_new.sum()), heads.num_heads, heads.head_dim, dtype=dtype, device=device)
    return AttentionCase(
        heads=heads,
        lens=lens,
        q=q.normal_(generator=generator),
        k_cache=cache[:, :, 0],
        v_cache=cache[:, :, 1],
        block_tables=block_tables,
        query_starts=query_starts,
        seq_lens=torch.tensor([length for _, length in lens], device=device),
        options=options,
    )


def _with_scales(cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales as an engine has them: of a block and head in one piece, its keys' before its values'."""
    codes, scales = encode(cache, dtype)
    num_codes, num_bytes = codes[0, 0, 0].nbytes, codes[0, 0, 0].nbytes + scales[0, 0, 0].nbytes
    memory = torch.empty(*cache.shape[:3], num_bytes, dtype=torch.uint8, device=cache.device)
    of_codes = memory[..., :num_codes].view(dtype).view(*cache.shape[:3], *cache.shape[3:])
    of_scales = memory[..., num_codes:].view(torch.float32)
    of_codes.copy_(codes)
    of_scales.copy_(scales)
    return of_codes, of_scales


def tree_options(lens: Lens, parents: list[int], device: torch.device) -> Options:
    """A tree mask and positions for a batch in which each sequence's last tokens are drafts with these parents.

    parents: the draft that each draft follows, -1 for the newest token
    """
    num_rows = sum(new for new, _ in lens)
    mask = torch.zeros(num_rows, max(new for new, _ in lens), dtype=torch.bool)
    positions = torch.zeros(num_rows, dtype=torch.int64)
    start = 0
    for new, length in lens:
        mask[start : start + new, :new] = torch.ones(new, new).tril().bool()
        positions[start : start + new] = torch.arange(length - new, length)
        root = new - len(parents) - 1
        assert root >= 0, f"{len(parents)} drafts and the token before them in {new} rows"
        for i, parent in enumerate(parents):
            row, above = start + root + 1 + i, start + root + 1 + parent
            mask[row] = mask[above]
            mask[row, root + 1 + i] = True
            positions[row] = positions[above] + 1
        start += new
    return {"tree_mask": mask.to(device), "positions": positions.to(device)}
