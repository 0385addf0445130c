"""Typical acceptance, which is LOSSY: drafts that are likely enough are kept, whatever the target would have sampled.

Medusa (Cai et al. 2024, arXiv 2401.10774, section 3.3.1), after truncation by typicality (Hewitt et al. 2022): a draft
x is kept if p(x) > min(threshold, alpha * exp(-H(p))), where p is the target's distribution at the request's
temperature and H its entropy. So where the target is unsure, more is good enough. What comes is text that the target
finds likely, and no longer a sample of its distribution: it depends on who drafts.

What a request forbids stays forbidden: penalties, bias and bans come before p, and a token outside of its min-p, top-k
or top-p is not kept. Greedy requests, and those that want log-probabilities, are verified exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.batch.device_inputs import to_device
from engine.batch.step_inputs import RowFacts, TypicalInputs
from engine.types import Scheduled

_FARTHEST_GAP = 80.0  # whose weight is none, and no infinity


class TypicalRule(NamedTuple):
    threshold: float  # the paper's epsilon
    alpha: float  # its delta


def typical_inputs(batch: list[Scheduled], rule: TypicalRule, greedy_below: float) -> TypicalInputs | None:
    """The drafts of a plan that may be kept for being likely. None: there are none."""
    parents: list[int] = []
    drafts: list[int] = []
    tokens: list[int] = []
    root = 0
    for item in batch:
        params = item.seq.request.params
        if item.num_drafts and params.temperature >= greedy_below and params.logprobs is None:
            parents += [root + 1 + parent for parent in item.seq.draft_parents[: item.num_drafts]]
            drafts += range(root + 1, root + 1 + item.num_drafts)
            tokens += item.seq.draft_token_ids[: item.num_drafts]
        root += item.num_sampled_rows
    if not drafts:
        return None
    rows, places = np.unique(np.array(parents, dtype=np.int64), return_inverse=True)
    columns = (rows, places, np.array(drafts, dtype=np.int64), np.array(tokens, dtype=np.int64))
    return TypicalInputs(*columns, threshold=rule.threshold, alpha=rule.alpha)


def are_typical(logits: Tensor, inputs: TypicalInputs, facts: RowFacts) -> Tensor:
    """Whether each draft is likely enough. [num_drafts] bool

    logits: [len(inputs.rows), vocab_size] float32, as the rows are sampled, but for the temperature
    """
    device, rows = logits.device, inputs.rows
    columns = np.stack((facts.temperatures[rows], facts.max_gaps[rows], facts.top_ps[rows])).astype(np.float64)
    temperatures, max_gaps, top_ps = to_device(columns, device).float()
    gaps = (logits.amax(-1, keepdim=True) - logits) / temperatures[:, None]
    near = gaps.clamp_max(_FARTHEST_GAP)
    weights = (-near).exp()
    totals = weights.sum(-1)
    entropies = totals.log() + (weights * near).sum(-1) / totals
    bounds = (inputs.alpha * (-entropies).exp()).clamp_max(inputs.threshold)
    places, tokens = to_device(np.stack((inputs.places, inputs.tokens)), device)
    own = gaps[places, tokens]
    is_typical: Tensor = ((-own).exp() / totals[places] > bounds[places]) & (own <= max_gaps[places])
    top_ks = facts.top_ks[rows]
    has_limits = bool((top_ks < logits.shape[1]).any() or (facts.top_ps[rows] < 1.0).any())
    if not has_limits:
        return is_typical
    left = torch.where(gaps <= max_gaps[:, None], weights, 0.0)
    for row in np.flatnonzero(top_ks < logits.shape[1]).tolist():
        last = gaps[row].kthvalue(int(top_ks[row])).values
        left[row] = torch.where(gaps[row] <= last, left[row], 0.0)
    ids = torch.arange(logits.shape[1], device=device)
    for draft in torch.nonzero(is_typical)[:, 0].tolist():
        row, token = int(inputs.places[draft]), int(inputs.tokens[draft])
        is_before = (gaps[row] < own[draft]) | ((gaps[row] == own[draft]) & (ids < token))
        is_inside = (left[row] * is_before).sum() < top_ps[row] * left[row].sum()
        is_typical[draft] &= is_inside & (is_before.sum() < int(top_ks[row]))
    return is_typical


def accept_typical(sampled: list[int], tokens: list[int], parents: list[int], is_typical: list[bool]) -> list[int]:
    """The longest path of drafts that were sampled or are likely enough; of equals, that with more that were sampled.

    As `engine.sampling.acceptance.accept`, but for `is_typical`: [num_drafts]
    """
    scores: dict[int, tuple[int, int]] = {-1: (0, 0)}  # of each draft that may be kept: depth, sampled ones
    paths: dict[int, list[int]] = {-1: []}
    best = -1
    for draft, parent in enumerate(parents):
        is_sampled = tokens[draft] == sampled[parent + 1]
        if parent in scores and sampled[draft + 1] >= 0 and (is_sampled or is_typical[draft]):
            depth, number = scores[parent]
            scores[draft], paths[draft] = (depth + 1, number + is_sampled), [*paths[parent], draft]
            best = draft if scores[draft] > scores[best] else best
    return paths[best]
