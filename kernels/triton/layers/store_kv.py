"""The write of a step's keys and values into the paged KV cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import next_power_of_2
from kernels.triton.kv_codes import check_scales, encode


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """As `kernels.reference.attention.store_kv`.

    slots: a negative one skips the token (the padding of a CUDA graph)
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    assert v.shape == k.shape, f"keys {tuple(k.shape)}, values {tuple(v.shape)}"
    assert slots.shape == (num_tokens,), f"{tuple(slots.shape)} slots for {num_tokens} tokens"
    assert k_cache.shape == v_cache.shape, f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    assert (k_cache.shape[1], k_cache.shape[3]) == (num_kv_heads, head_dim), f"{tuple(k_cache.shape)} for {k.shape}"
    assert k_cache.stride() == v_cache.stride(), "keys and values lie alike"
    assert k.stride(2) == v.stride(2) == k_cache.stride(3) == 1, "the head dimension is contiguous"
    check_scales(k_cache, v_cache, k_scales, v_scales)
    if not num_tokens:
        return
    padded_heads, padded_dim = next_power_of_2(num_kv_heads), next_power_of_2(head_dim)
    store_kv_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        k_cache if k_scales is None else k_scales,
        v_cache if v_scales is None else v_scales,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *k_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        PADDED_HEADS=padded_heads,
        PADDED_DIM=padded_dim,
        HAS_SCALES=k_scales is not None,
        num_warps=min(8, max(1, padded_heads * padded_dim // 256)),
    )


@triton.jit
def store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_slot,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    # grid: [num_tokens]; one program copies one token's keys and values
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, PADDED_HEADS).to(tl.int64)[:, None]
    dims = tl.arange(0, PADDED_DIM)[None, :]
    is_element = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)
    places = heads * stride_cache_head + (slot // BLOCK_SIZE) * stride_cache_block
    offsets = places + (slot % BLOCK_SIZE) * stride_cache_slot + dims
    k = tl.load(k_ptr + token * stride_k_token + heads * stride_k_head + dims, mask=is_element, other=0.0)
    v = tl.load(v_ptr + token * stride_v_token + heads * stride_v_head + dims, mask=is_element, other=0.0)
    if HAS_SCALES:
        k, k_scales = encode(k.to(tl.float32), 1, k_cache_ptr.dtype.element_ty)
        v, v_scales = encode(v.to(tl.float32), 1, v_cache_ptr.dtype.element_ty)
        targets = places // 4 + slot % BLOCK_SIZE
        tl.store(k_scales_ptr + targets, k_scales[:, None], mask=heads < NUM_KV_HEADS)
        tl.store(v_scales_ptr + targets, v_scales[:, None], mask=heads < NUM_KV_HEADS)
    tl.store(k_cache_ptr + offsets, k.to(k_cache_ptr.dtype.element_ty), mask=is_element)
    tl.store(v_cache_ptr + offsets, v.to(v_cache_ptr.dtype.element_ty), mask=is_element)
