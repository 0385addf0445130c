"""Mixtures of experts, defined in plain torch: every token goes through the few experts that its router likes best."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import silu_and_mul


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


def mix_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The weighted sum of each token's experts, each of them down(silu(gate(x)) * up(x)).

    x: [num_tokens, hidden_size]
    gate_up: [num_experts, 2 * intermediate_size, hidden_size], gate first
    down: [num_experts, hidden_size, intermediate_size]
    weights, experts: [num_tokens, top_k] of `route`
    Returns [num_tokens, hidden_size] in x's dtype; the sum is in float32.
    """
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        hidden = silu_and_mul(x[tokens] @ gate_up[expert].T)
        out.index_add_(0, tokens, (hidden @ down[expert].T).to(out.dtype) * weights[tokens, place, None])
    return out.to(x.dtype)
