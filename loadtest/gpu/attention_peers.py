"""Other implementations of attention over the same keys and values, each in the layout that suits it best."""

from __future__ import annotations

import importlib.util
import lzma
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from loadtest.gpu.attention_case import AttentionCase
from loadtest.gpu.wheels import FLASH_LIBRARY, PACKAGE

Attend = Callable[[], Tensor]  # -> [num_tokens, num_heads, head_dim]


def sdpa(case: AttentionCase) -> Attend:
    """torch's fused kernel, over contiguous keys and values that it need not look up."""
    q, k, v, is_causal = _contiguous(case)

    def attend() -> Tensor:
        return _as_rows(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True))

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


def _contiguous(case: AttentionCase) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Contiguous queries, keys and values, [batch, heads, length, head_dim] each. Sequences must have equal lengths."""
    (new, length), *others = set(case.lens)
    assert not others, f"sequences of different lengths: {case.lens}"
    assert new in (1, length), f"{new} new of {length} tokens"
    k, v = (
        cache[case.block_tables].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for cache in (case.k_cache, case.v_cache)
    )
    q = case.q.view(len(case.lens), new, *case.q.shape[1:]).transpose(1, 2).contiguous()
    return q, k, v, new > 1


def _as_rows(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


@cache
def _flash_operation() -> Callable[..., list[Tensor]]:
    torch.ops.load_library(str(_unpacked_library()))  # type: ignore[no-untyped-call]
    operation: Callable[..., list[Tensor]] = torch.ops._vllm_fa3_C.fwd
    return operation


def _unpacked_library() -> Path:
    """vLLM builds it as one shared library, which is carried along packed.

    Unpacks it, once a machine. FileNotFoundError where it was not carried along.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("FlashAttention-3 was not carried along")
    packed = Path(next(iter(spec.submodule_search_locations))) / f"{FLASH_LIBRARY}.xz"
    unpacked = Path(tempfile.gettempdir()) / FLASH_LIBRARY
    if not unpacked.exists() or unpacked.stat().st_mtime < packed.stat().st_mtime:
        partial = unpacked.with_suffix(".partial")
        partial.write_bytes(lzma.decompress(packed.read_bytes()))
        partial.replace(unpacked)
    return unpacked
