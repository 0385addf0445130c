"""Head norms, rotation and KV write as one operation: all that lies between the merged projection and attention."""

from __future__ import annotations

from torch import Tensor

from kernels.reference.attention import store_kv
from kernels.reference.norm import rms_norm
from kernels.reference.rope import apply_rope


def normalise_and_rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them. What is None is left out; arguments as in `rotate_and_store`.

    q: [num_tokens, num_heads, head_dim]; k: [num_tokens, num_kv_heads, head_dim]
    """
    if q_weight is not None and k_weight is not None:
        q, k = _normalise(q, q_weight, eps), _normalise(k, k_weight, eps)
    if cos is not None and sin is not None:
        q, k = apply_rope(q, k, cos.to(q.dtype), sin.to(q.dtype))
    return q, k


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Normalises queries and keys where there are weights, rotates them, writes keys and values.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first
    cos, sin: [num_tokens, R] of `rope_factors`, R <= head_dim; None: no rotation (a layer without positions)
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    slots: [num_tokens], block * block_size + offset
    q_weight, k_weight: [head_dim], a norm of each head (Qwen3), or [heads * head_dim], of all as one (OLMoE)
    k_scales, v_scales: as in `store_kv`
    Returns the queries, [num_tokens, num_heads, head_dim].
    """
    num_kv_heads = k_cache.shape[1]
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # type: ignore[no-untyped-call]
    q, k = normalise_and_rotate(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps)
    store_kv(k, v, k_cache, v_cache, slots, k_scales, v_scales)
    return q


def _normalise(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.shape[0] == heads.shape[2]:
        return rms_norm(heads, weight, eps)
    return rms_norm(heads.flatten(1), weight, eps).view(heads.shape)
