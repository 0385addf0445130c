"""Weights in memory of huge pages."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from engine.quantization.huge_pages import HugePages


@pytest.mark.parametrize("num_threads", [1, 4])
def test_copies_are_what_was_kept_and_lie_apart(num_threads: int) -> None:
    memory = HugePages()
    tensors = [torch.full((rows, 1001), rows, dtype=torch.int16) for rows in range(1, 400, 7)]
    tensors.append(torch.randn(3, 3_000_000))  # larger than what is asked for at once
    tensors.append(torch.arange(24).view(2, 3, 4).transpose(0, 2))
    with ThreadPoolExecutor(num_threads) as pool:
        copies = list(pool.map(lambda tensor: memory.empty(tensor.shape, tensor.dtype).copy_(tensor), tensors))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
    places = sorted((copy.data_ptr(), copy.nbytes) for copy in copies)
    assert all(start + size <= following for (start, size), (following, _) in pairwise(places))
