"""Head norms, rotation and KV write in one kernel: all that lies between the merged projection and attention."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import next_power_of_2
from kernels.triton.kv_codes import check_scales, encode


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
    """As `kernels.reference.qkv.rotate_and_store`, in float32.

    slots: a negative one skips the write (the padding of a CUDA graph)
    """
    num_tokens, all_heads, head_dim = qkv.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    assert all_heads == num_heads + 2 * num_kv_heads, f"{all_heads} heads, not {num_heads} + 2 * {num_kv_heads}"
    assert (cos is None, q_weight is None) == (sin is None, k_weight is None), "both factors, both norms, or none"
    assert k_cache.shape[3] == head_dim, f"heads of {head_dim} for a cache of {k_cache.shape[3]}"
    assert k_cache.stride() == v_cache.stride(), "keys and values lie alike"
    assert qkv.stride(2) == k_cache.stride(3) == 1, "rows are contiguous"
    check_scales(k_cache, v_cache, k_scales, v_scales)
    width = 0 if cos is None or sin is None else _rotated_width(cos, sin, num_tokens, head_dim)
    is_joint = q_weight is not None and k_weight is not None and _is_joint(q_weight, k_weight, qkv, num_heads)
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        qkv_kernel[(num_tokens, all_heads)](
            qkv,
            qkv if cos is None else cos,
            qkv if sin is None else sin,
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            slots,
            q,
            k_cache,
            v_cache,
            k_cache if k_scales is None else k_scales,
            v_cache if v_scales is None else v_scales,
            eps,
            *qkv.stride()[:2],
            0 if cos is None else cos.stride(0),
            *k_cache.stride()[:3],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PADDED_DIM=next_power_of_2(head_dim),
            PADDED_ROW=next_power_of_2(num_heads * head_dim) if is_joint else 1,
            WIDTH=width,
            BLOCK_SIZE=block_size,
            HAS_NORM=q_weight is not None,
            IS_JOINT=is_joint,
            HAS_SCALES=k_scales is not None,
            num_warps=4 if is_joint else 1,
        )
    return q


def _rotated_width(cos: Tensor, sin: Tensor, num_tokens: int, head_dim: int) -> int:
    width = cos.shape[1]
    assert cos.shape == sin.shape == (num_tokens, width), f"factors {tuple(cos.shape)}, {tuple(sin.shape)}"
    assert cos.stride() == sin.stride() == (cos.stride(0), 1), "rows are contiguous, and both lie alike"
    assert width <= head_dim, f"{width} of {head_dim} dimensions cannot be rotated"
    return width


def _is_joint(q_weight: Tensor, k_weight: Tensor, qkv: Tensor, num_heads: int) -> bool:
    """Whether one norm is over all heads together, instead of one over each head."""
    head_dim, num_kv_heads = qkv.shape[2], (qkv.shape[1] - num_heads) // 2
    if q_weight.shape == k_weight.shape == (head_dim,):
        return False
    sizes = [num_heads * head_dim, num_kv_heads * head_dim]
    assert [*q_weight.shape, *k_weight.shape] == sizes, f"{q_weight.shape}, {k_weight.shape} for {sizes}"
    assert qkv.stride(1) == head_dim, "heads lie one after the other"
    return True


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
    k_scales_ptr,
    v_scales_ptr,
    eps,
    stride_token,
    stride_head,
    stride_factor,
    stride_cache_block,
    stride_cache_head,
    stride_cache_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_JOINT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    # grid: [num_tokens, num_heads + 2 * num_kv_heads]; one program normalises, rotates and stores one head of one token
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
            if IS_JOINT:  # each program sums the squares of all heads: that costs less than a synchronisation
                first = 0 if head < NUM_HEADS else NUM_HEADS
                size = (NUM_HEADS if head < NUM_HEADS else NUM_KV_HEADS) * HEAD_DIM
                weight_ptr += (head - first) * HEAD_DIM
                within = tl.arange(0, PADDED_ROW)
                row = tl.load(source + (first - head) * HEAD_DIM + within, mask=within < size, other=0.0).to(tl.float32)
                mean = tl.sum(row * row, 0) / size
            else:
                mean = tl.sum(x * x, 0) / HEAD_DIM
            scale = tl.rsqrt(mean + eps)
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
            offset = place + (slot % BLOCK_SIZE) * stride_cache_slot
            if HAS_SCALES:
                stored, scale = encode(x, 0, k_cache_ptr.dtype.element_ty)
                if head < NUM_HEADS + NUM_KV_HEADS:
                    tl.store(k_scales_ptr + place // 4 + slot % BLOCK_SIZE, scale)
                else:
                    tl.store(v_scales_ptr + place // 4 + slot % BLOCK_SIZE, scale)
            else:
                stored = x.to(k_cache_ptr.dtype.element_ty)
            if head < NUM_HEADS + NUM_KV_HEADS:
                tl.store(k_cache_ptr + offset + dims, stored, mask=is_dim)
            else:
                tl.store(v_cache_ptr + offset + dims, stored, mask=is_dim)
