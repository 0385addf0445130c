"""The tensors of one forward pass, passed as an argument and never kept in a global."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.types import Scheduled


@dataclass(slots=True, frozen=True)
class ForwardBatch:
    """One step's rows, sequence after sequence.

    Sequence b owns rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of seq_lens[b]
    tokens. `logits_rows` are the rows whose logits are wanted, in order.
    """

    input_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]; a draft's position is its depth, siblings share one
    slots: Tensor  # [num_tokens] block * block_size + offset: where each token's key and value go
    query_starts: Tensor  # [num_seqs + 1]
    seq_lens: Tensor  # [num_seqs] context length, new tokens and drafts included
    block_tables: Tensor  # [num_seqs, max_blocks]; block 0 stands where a sliding window freed one
    logits_rows: Tensor  # [num_logits]
    tree_mask: Tensor | None  # [num_tokens, max_query_len] whether the row sees the sequence's j-th row; None: causal
    query_starts_list: list[int]  # the same numbers on the host, so that a back end need not copy them back
    seq_lens_list: list[int]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_list)


def build_forward_batch(batch: list[Scheduled], block_size: int, device: torch.device) -> ForwardBatch:
    """Builds the tensors on the host with vectorised code and copies them to `device`."""
    num_new = np.array([item.num_new_tokens for item in batch], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(num_new)))
    computed = np.array([item.seq.num_computed_tokens for item in batch], dtype=np.int64)
    rows = np.arange(starts[-1])
    seq_of_row = np.repeat(np.arange(len(batch)), num_new)
    cache_positions = rows - starts[seq_of_row] + computed[seq_of_row]  # where in the context, drafts in order
    token_ids: list[int] = []
    for item in batch:
        token_ids += _input_ids(item)
    width = max(len(item.seq.block_table) for item in batch)
    tables = np.zeros((len(batch), width), dtype=np.int64)
    for table, item in zip(tables, batch, strict=True):
        table[: len(item.seq.block_table)] = item.seq.block_table
    slots = tables[seq_of_row, cache_positions // block_size] * block_size + cache_positions % block_size
    num_logits = np.array([item.num_logits for item in batch], dtype=np.int64)
    ends = np.cumsum(num_logits)
    logits_rows = np.arange(ends[-1]) + np.repeat(starts[1:] - ends, num_logits)
    is_tree = any(_is_tree(item) for item in batch)
    seq_lens = computed + num_new

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardBatch(
        input_ids=torch.tensor(token_ids, device=device),
        positions=on_device(_tree_positions(batch, starts, cache_positions) if is_tree else cache_positions),
        slots=on_device(slots),
        query_starts=on_device(starts),
        seq_lens=on_device(seq_lens),
        block_tables=on_device(tables),
        logits_rows=on_device(logits_rows),
        tree_mask=on_device(_tree_mask(batch, starts)) if is_tree else None,
        query_starts_list=starts.tolist(),
        seq_lens_list=seq_lens.tolist(),
    )


def _input_ids(item: Scheduled) -> list[int]:
    seq, start = item.seq, item.seq.num_computed_tokens
    verified = seq.token_ids[start : start + item.num_new_tokens - item.num_drafts]
    return verified + seq.draft_token_ids[: item.num_drafts]


def _is_tree(item: Scheduled) -> bool:
    return any(parent != i - 1 for i, parent in enumerate(item.seq.draft_parents[: item.num_drafts]))


def _tree_positions(batch: list[Scheduled], starts: np.ndarray, cache_positions: np.ndarray) -> np.ndarray:
    positions = cache_positions.copy()
    for item, end in zip(batch, starts[1:], strict=True):
        first = end - item.num_drafts
        depths: list[int] = []
        for parent in item.seq.draft_parents[: item.num_drafts]:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        if depths:
            positions[first:end] = positions[first - 1] + np.array(depths, dtype=np.int64)
    return positions


def _tree_mask(batch: list[Scheduled], starts: np.ndarray) -> np.ndarray:
    width = int(np.diff(starts).max())
    mask = np.zeros((starts[-1], width), dtype=bool)
    for item, start in zip(batch, starts, strict=False):
        num_verified = item.num_new_tokens - item.num_drafts
        rows = mask[start : start + item.num_new_tokens]
        rows[:num_verified, :num_verified] = np.tri(num_verified, dtype=bool)
        for i, parent in enumerate(item.seq.draft_parents[: item.num_drafts]):
            row = num_verified + i
            rows[row] = rows[num_verified - 1 if parent < 0 else num_verified + parent]
            rows[row, row] = True
    return mask
