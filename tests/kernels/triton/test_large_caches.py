"""Caches of more elements than 32 bits can count: places in them must be computed in 64."""

import math
import mmap

import pytest
import torch
from torch import Tensor

from kernels.reference.attention import paged_attention as definition
from kernels.reference.attention import store_kv as define_store
from kernels.triton.attention.paged_attention import paged_attention
from kernels.triton.layers.qkv import rotate_and_store
from kernels.triton.layers.store_kv import store_kv

BLOCK_SIZE, HEAD_DIM = 16, 64
LENGTH = 40
SIZES = [(2, 1 << 31), (3, 1 << 30)]  # heads, elements of each: a block lies past 2^31, or the third head does


@pytest.fixture(params=SIZES)
def cache(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Keys that serve as values too, head by head in memory. Without a GPU, only pages that are written are there."""
    num_heads, size = request.param
    shape = (num_heads, size // (BLOCK_SIZE * HEAD_DIM) + 4, BLOCK_SIZE, HEAD_DIM)
    if device.type == "cuda":
        return torch.zeros(shape, dtype=torch.float16, device=device).transpose(0, 1)
    from triton.runtime.interpreter import GridExecutor

    # The interpreter works in the memory of a CPU's tensors, and afterwards copies all of it onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape)), dtype=torch.float16).view(shape).transpose(0, 1)


def _table(cache: Tensor) -> list[int]:
    num_blocks = len(cache)
    return [num_blocks - 1, 2, num_blocks - 3]


def _slots(cache: Tensor) -> Tensor:
    tokens = torch.arange(LENGTH)
    slots = torch.tensor(_table(cache))[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE
    return slots.to(cache.device)


def _rows(cache: Tensor) -> Tensor:
    return cache[_table(cache)].transpose(1, 2).flatten(0, 1)[:LENGTH]


def test_keys_and_values_are_written_and_read_past_two_billion_elements(cache: Tensor) -> None:
    num_heads, device = cache.shape[1], cache.device
    k = torch.randn(LENGTH, num_heads, HEAD_DIM, device=device).half()
    store_kv(k, k, cache, cache, _slots(cache))
    assert torch.equal(_rows(cache), k)
    small = torch.zeros(3, num_heads, BLOCK_SIZE, HEAD_DIM, dtype=torch.float16, device=device)
    define_store(k, k, small, small, torch.arange(LENGTH, device=device))
    for num_new in (1, LENGTH):  # a decoding row, and a prompt
        q = torch.randn(num_new, num_heads, HEAD_DIM, device=device).half()
        lens = (torch.tensor([0, num_new], device=device), torch.tensor([LENGTH], device=device))
        found = paged_attention(q, cache, cache, torch.tensor([_table(cache)], device=device), *lens, 0.2)
        expected = definition(q.double(), small, small, torch.arange(3, device=device)[None], *lens, 0.2)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_a_projection_goes_past_two_billion_elements(cache: Tensor) -> None:
    num_heads = cache.shape[1]
    qkv = torch.randn(LENGTH, 3 * num_heads, HEAD_DIM, device=cache.device).half()
    qkv[:, 2 * num_heads :] = qkv[:, num_heads : 2 * num_heads]  # values as keys: they share the memory
    rotate_and_store(qkv, None, None, cache, cache, _slots(cache), num_heads=num_heads)
    assert torch.equal(_rows(cache), qkv[:, 2 * num_heads :])
