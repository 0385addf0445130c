"""Attention by torch's own operations."""

import torch

from engine.attention.torch_backend import TorchAttention
from engine.attention.torch_plan import MAX_GROUPED_QUERIES
from engine.kv_cache.storage import KVCache
from tests.support.conformance.attention import AttentionConformance


class TestTorchAttention(AttentionConformance):
    block_sizes = (1, 4, 8, 16)
    longest_chunk = 3 * MAX_GROUPED_QUERIES

    def make(self, cache: KVCache) -> TorchAttention:
        return TorchAttention(cache)


class TestTorchAttentionOverInt8(TestTorchAttention):
    kept_as = torch.int8
    precisions = ((torch.float32, torch.int8), (torch.bfloat16, torch.int8))
