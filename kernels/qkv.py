"""What happens between the merged projection and attention: head norms, rotation and the KV write, as one."""

from __future__ import annotations

from torch import Tensor

from kernels.attention import store_kv
from kernels.norm import rms_norm
from kernels.rope import apply_rope


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalises each query and key head where there are weights (Qwen3), rotates them, writes keys and values.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first
    cos, sin: [num_tokens, R] of `rope_factors`, R <= head_dim
    k_cache, v_cache: [num_kv_heads, num_blocks, block_size, head_dim]
    slots: [num_tokens], block * block_size + offset
    q_weight, k_weight: [head_dim], both or neither
    Returns the queries, [num_tokens, num_heads, head_dim].
    """
    num_kv_heads = k_cache.shape[0]
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    q, k = apply_rope(q, k, cos.to(q.dtype), sin.to(q.dtype))
    store_kv(k, v, k_cache, v_cache, slots)
    return q
