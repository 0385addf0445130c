"""Embeddings: the hidden states of a prompt, pooled to one vector, chunk by chunk.

"last" takes that of the last token (Neelakantan et al. 2022, "Text and Code Embeddings by Contrastive Pre-Training"),
"mean" the average of all tokens (Reimers and Gurevych 2019, "Sentence-BERT"). Sums are in float64, in which those of
16-bit numbers are exact: how a prompt was cut into chunks does not show.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Doubles
from engine.batch.gather import GatheredStep
from engine.batch.step_inputs import PoolingInputs
from engine.types import Sampled, Scheduled, Sequence

_NOT_FINITE = "the hidden states of the prompt are not finite numbers: float16 may be too small for this model"


def pooling_inputs(batch: list[Scheduled], step: GatheredStep, *, shows_all_rows: bool) -> PoolingInputs | None:
    """What a step sums up for the items that want a vector; None where none does.

    shows_all_rows: whether somebody wants the hidden states of all rows, not of those with logits alone
    """
    if len(step.logits_rows) == len(step.input_ids):  # every row is for a token
        return None
    seqs, firsts, ends = [], [], []
    for place, item in enumerate(batch):
        if _is_summed(item):
            end = int(step.query_starts[place + 1])
            seqs.append(place)
            firsts.append(end - (1 if item.seq.request.pooling == "last" else item.num_new_tokens))
            ends.append(end)
    if not seqs:
        return None
    shown = None if shows_all_rows else step.logits_rows
    columns = np.array([seqs, firsts, ends], dtype=np.int64)
    return PoolingInputs(columns[0], columns[1], columns[2], shown)


def _is_summed(item: Scheduled) -> bool:
    pooling = item.seq.request.pooling
    return pooling == "mean" or (pooling == "last" and item.next_position == item.seq.num_tokens)


def sum_rows(hidden: Tensor, pooled: PoolingInputs, hidden_size: int) -> Tensor:
    """The sums of a step. hidden: [num_tokens, hidden_size or more] -> [num_pooled, hidden_size] float64"""
    out = hidden.new_empty(len(pooled.seqs), hidden_size, dtype=torch.float64)
    for place, (first, end) in enumerate(zip(pooled.firsts.tolist(), pooled.ends.tolist(), strict=True)):
        out[place] = hidden[first:end, :hidden_size].sum(0, dtype=torch.float64)
    return out


def hand_out(sums: Tensor, pooled: PoolingInputs, sampled: list[Sampled]) -> None:
    """Gives each sequence its sum, or an error where that is not a number."""
    vectors: Doubles = sums.cpu().numpy()
    for place, vector in zip(pooled.seqs.tolist(), vectors, strict=True):
        if np.isfinite(vector).all():
            sampled[place].pooled = vector
        else:
            sampled[place] = Sampled([], error=_NOT_FINITE)


def add_rows(seq: Sequence, result: Sampled) -> None:
    """Adds what a step has summed up. Call it before the sequence's progress changes: at its start, it begins anew."""
    if result.pooled is None:
        return
    before = None if seq.num_computed_tokens == 0 or seq.request.pooling == "last" else seq.pooled_sum
    seq.pooled_sum = result.pooled if before is None else before + result.pooled


def is_complete(seq: Sequence) -> bool:
    """Whether all of a prompt that is pooled has been computed."""
    return seq.request.pooling is not None and seq.num_computed_tokens == seq.num_tokens


def pooled_vector(seq: Sequence) -> bytes | None:
    """The vector of a prompt that is complete; None of a request for text."""
    if not is_complete(seq) or seq.pooled_sum is None:
        return None
    num_rows = 1 if seq.request.pooling == "last" else seq.num_tokens
    return (seq.pooled_sum / num_rows).astype("<f4").tobytes()
