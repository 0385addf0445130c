"""Mixtures of experts, defined in plain torch: each token is computed by the top_k experts of its router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.activation import silu_and_mul


def route(router_logits: Tensor, top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their shares: (weights float32, experts int64), [num_tokens, top_k] each.

    Softmax over all experts in float32, then the largest; of equal ones the lowest number. With `normalise` the kept
    shares are scaled to sum to one (Mixtral, Qwen3); without, they are left as they are (OLMoE).

    router_logits: [num_tokens, num_experts]
    """
    shares = router_logits.float().softmax(-1)
    order = shares.sort(dim=-1, descending=True, stable=True)
    weights, experts = order.values[:, :top_k], order.indices[:, :top_k]
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.contiguous(), experts.contiguous()


def mix_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, min_rows: int = 1
) -> Tensor:
    """The weighted sum of each token's experts, each of them down(silu(gate(x)) * up(x)).

    x: [num_tokens, hidden_size]
    gate_up: [num_experts, 2 * intermediate_size, hidden_size], gate first
    down: [num_experts, hidden_size, intermediate_size]
    weights, experts: [num_tokens, top_k] of `route`
    min_rows: of each product, shorter ones are padded with zeros (`engine.runner.padded_rows` says why)
    Returns [num_tokens, hidden_size] in x's dtype; the sum is in float32, in the order of the experts' shares.
    """
    (num_tokens, top_k), num_experts = experts.shape, gate_up.shape[0]
    chosen = experts.flatten()  # by pair of a token and one of its experts
    counts: list[int] = chosen.bincount(minlength=num_experts).tolist()
    parts = x.new_empty(num_tokens * top_k, x.shape[1])
    for expert, pairs in enumerate(chosen.argsort(stable=True).split(counts)):  # type: ignore[no-untyped-call]
        if len(pairs):  # the weights of an expert without tokens are not read
            rows = F.pad(x[pairs // top_k], (0, 0, 0, max(min_rows - len(pairs), 0)))
            hidden = silu_and_mul(F.linear(rows, gate_up[expert]))
            parts[pairs] = F.linear(hidden, down[expert])[: len(pairs)]
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = parts.view(num_tokens, top_k, x.shape[1]).to(wide)
    return (weights[..., None].to(wide) * parts).sum(1).to(x.dtype)
