"""What happens between the merged projection and attention: head norms, rotation and the KV write, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import next_power_of_2


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

    In float32 from the load to the store.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first
    cos, sin: [num_tokens, R] of `rope_factors`, R <= head_dim
    k_cache, v_cache: [num_kv_heads, num_blocks, block_size, head_dim]
    slots: [num_tokens], block * block_size + offset; a negative one skips the write (the padding of a CUDA graph)
    q_weight, k_weight: [head_dim], both or neither
    Returns the queries, [num_tokens, num_heads, head_dim].
    """
    num_tokens, all_heads, head_dim = qkv.shape
    num_kv_heads, _, block_size, _ = k_cache.shape
    assert all_heads == num_heads + 2 * num_kv_heads, f"{all_heads} heads, not {num_heads} + 2 * {num_kv_heads}"
    assert cos.shape == sin.shape == (num_tokens, cos.shape[1]), f"factors {tuple(cos.shape)}, {tuple(sin.shape)}"
    assert cos.shape[1] <= head_dim, f"{cos.shape[1]} of {head_dim} dimensions cannot turn"
    assert (q_weight is None) == (k_weight is None), "both norms or none"
    assert k_cache.shape[3] == head_dim, f"heads of {head_dim} for a cache of {k_cache.shape[3]}"
    assert k_cache.stride() == v_cache.stride(), "keys and values lie alike"
    assert qkv.stride(2) == cos.stride(1) == sin.stride(1) == k_cache.stride(3) == 1, "rows are contiguous"
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        qkv_kernel[(num_tokens, all_heads)](
            qkv,
            cos,
            sin,
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            slots,
            q,
            k_cache,
            v_cache,
            eps,
            *qkv.stride()[:2],
            cos.stride(0),
            *k_cache.stride()[:3],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PADDED_DIM=next_power_of_2(head_dim),
            WIDTH=cos.shape[1],
            BLOCK_SIZE=block_size,
            HAS_NORM=q_weight is not None,
            num_warps=1,
        )
    return q


@triton.jit
def qkv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    stride_token,
    stride_head,
    stride_factor,
    stride_cache_head,
    stride_cache_block,
    stride_cache_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    # grid: [num_tokens, num_heads + 2 * num_kv_heads]; one program takes one head of one token to where it goes
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    source = qkv_ptr + token * stride_token + head * stride_head
    x = tl.load(source + dims, mask=is_dim, other=0.0).to(tl.float32)
    if head < NUM_HEADS + NUM_KV_HEADS:
        # the other element of each pair is read again (from the first-level cache) instead of exchanged
        partners = tl.where(dims < WIDTH // 2, dims + WIDTH // 2, dims - WIDTH // 2)
        is_turned = dims < WIDTH
        partner = tl.load(source + partners, mask=is_turned, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight_ptr = q_weight_ptr if head < NUM_HEADS else k_weight_ptr
            scale = tl.rsqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)
            x *= scale * tl.load(weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
            partner *= scale * tl.load(weight_ptr + partners, mask=is_turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * stride_factor + dims, mask=is_turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * stride_factor + dims, mask=is_turned, other=0.0).to(tl.float32)
        x = x * cos + partner * sin  # the first half of sin is negated
    if head < NUM_HEADS:
        target = q_ptr + (token * NUM_HEADS + head) * HEAD_DIM
        tl.store(target + dims, x.to(q_ptr.dtype.element_ty), mask=is_dim)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            kv_head = ((head - NUM_HEADS) % NUM_KV_HEADS).to(tl.int64)
            place = kv_head * stride_cache_head + (slot // BLOCK_SIZE) * stride_cache_block
            place += (slot % BLOCK_SIZE) * stride_cache_slot
            if head < NUM_HEADS + NUM_KV_HEADS:
                tl.store(k_cache_ptr + place + dims, x.to(k_cache_ptr.dtype.element_ty), mask=is_dim)
            else:
                tl.store(v_cache_ptr + place + dims, x.to(v_cache_ptr.dtype.element_ty), mask=is_dim)
