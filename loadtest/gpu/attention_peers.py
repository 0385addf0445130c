"""Others' attention over the same keys and values, each in the layout that suits it best."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from loadtest.gpu.attention_case import AttentionCase
from loadtest.gpu.flash_library import unpacked_flash_library

Attend = Callable[[], Tensor]  # -> [num_tokens, num_heads, head_dim]


def sdpa(case: AttentionCase) -> Attend:
    """torch's fused kernel, over contiguous keys and values that it need not look up."""
    q, k, v, is_causal = _contiguous(case)

    def attend() -> Tensor:
        return _as_rows(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True))

    return attend


def flex(case: AttentionCase) -> Attend:
    """torch's compiled FlexAttention, over contiguous keys and values."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, is_causal = _contiguous(case)
    mask = None
    if is_causal:
        length = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> Tensor:
        return _as_rows(compiled(q, k, v, block_mask=mask, enable_gqa=True))

    return attend


def flash(case: AttentionCase) -> Attend:
    """FlashAttention-3, paged, with the number of splits that it chooses itself. FileNotFoundError where it is not."""
    fwd = _flash_operation()
    k, v = (cache.transpose(1, 2).contiguous() for cache in (case.k_cache, case.v_cache))
    starts, seq_lens, tables = (x.int() for x in (case.query_starts, case.seq_lens, case.block_tables))
    longest_query, longest = (max(part) for part in zip(*case.lens, strict=True))

    def attend() -> Tensor:
        before = (case.q, k, v, None, None, None, None, starts, None, None, None, seq_lens)
        nothing = (None,) * 8  # batch indices, left padding, rotary factors, scales
        after = (case.scale, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)
        return fwd(*before, longest_query, longest, tables, *nothing, *after)[0]

    return attend


PEERS = {"SDPA": sdpa, "FlashAttention-3": flash}
COMPILED_PEERS = {"FlexAttention": flex}  # by torch's compiler, which takes ten seconds and more


def _contiguous(case: AttentionCase) -> tuple[Tensor, Tensor, Tensor, bool]:
    """[batch, heads, length, head_dim] each. All sequences decode one token, or all are prompts, of one length."""
    (new, length), *others = set(case.lens)
    assert not others, f"sequences of different lengths: {case.lens}"
    assert new in (1, length), f"{new} new of {length} tokens"
    k, v = (
        cache[case.block_tables].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for cache in (case.k_cache, case.v_cache)
    )
    q = case.q.unflatten(0, (len(case.lens), new)).transpose(1, 2).contiguous()
    return q, k, v, new > 1


def _as_rows(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


@cache
def _flash_operation() -> Callable[..., list[Tensor]]:
    torch.ops.load_library(str(unpacked_flash_library()))
    operation: Callable[..., list[Tensor]] = torch.ops._vllm_fa3_C.fwd
    return operation
