"""What does attention over the paged cache cost here? `python -m loadtest.micro.attention [--threads 2] [--save]`

Microseconds per layer of SmolLM2-135M's shapes (9 heads, 3 KV heads, head size 64): the back end that the engine runs,
the matrix products alone on contexts that already lie together, and the fused kernel on the same. It decides
`engine.attention.torch_plan`: how many rows per sequence still go through batched products.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import engine.attention.torch_plan
from engine.attention.torch_backend import TorchAttention
from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.torch_cpu.batched_attention import attend
from loadtest.micro.measure import Row, fastest, parse_arguments, report

LAYER = AttentionLayer(0, num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)
BLOCK_SIZE = 16
STEPS = [(1, 1), (8, 1), (32, 1), (8, 5), (1, 8), (1, 16), (1, 32), (1, 128)]  # sequences, new tokens of each
CONTEXTS = [128, 512, 2048]


def main() -> None:
    arguments = parse_arguments(main.__doc__ or __doc__ or "")
    with torch.inference_mode():
        rows = [_measure(*step, context) for context in CONTEXTS for step in STEPS]
    report("attention", rows, arguments)


def _measure(num_seqs: int, num_queries: int, context: int) -> Row:
    num_calls = max(3, 20_000 // (num_seqs * context))
    batch = make_batch(num_seqs, num_queries, context)
    cache = KVCache(
        [LAYER], num_blocks=num_seqs * context // BLOCK_SIZE, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
    )
    q, k, v = (torch.randn(num_seqs * num_queries, heads, LAYER.head_dim) for heads in (9, 3, 3))
    row: Row = {"seqs": num_seqs, "new": num_queries, "context": context}
    limit = engine.attention.torch_plan.MAX_GROUPED_QUERIES
    for name, max_grouped in (("grouped", num_queries), ("one by one", 0)):
        engine.attention.torch_plan.MAX_GROUPED_QUERIES = max_grouped
        backend = TorchAttention(cache)
        work = partial(_attend, backend, q, k, v, batch)
        row[name] = 1e6 * fastest(work, num_calls=num_calls)
    engine.attention.torch_plan.MAX_GROUPED_QUERIES = limit
    row.update(_products_alone(num_seqs, num_queries, context, num_calls))
    return row


def _attend(backend: TorchAttention, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, _: int) -> Tensor:
    return backend(q, k, v, LAYER, batch)


def _products_alone(num_seqs: int, num_queries: int, context: int, num_calls: int) -> Row:
    group, head_dim = LAYER.num_heads // LAYER.num_kv_heads, LAYER.head_dim
    num_contexts = num_seqs * LAYER.num_kv_heads
    q = torch.randn(num_contexts, group * num_queries, head_dim)
    k, v = torch.randn(2, num_contexts, context, head_dim)
    bias = torch.zeros(num_contexts, 1, context)
    return {
        "products alone": 1e6 * fastest(lambda _: attend(q, k, v, bias, LAYER.scale, None), num_calls=num_calls),
        "fused alone": 1e6
        * fastest(
            lambda _: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias[:, None]),
            num_calls=num_calls,
        ),
    }


def make_batch(num_seqs: int, num_queries: int, context: int) -> ForwardBatch:
    num_blocks = context // BLOCK_SIZE
    blocks = torch.randperm(num_seqs * num_blocks).view(num_seqs, num_blocks)
    plan = []
    for table in blocks.tolist():
        params = SamplingParams(seed=0, max_tokens=1)
        seq = Sequence(Request(request_id="", prompt_token_ids=[0] * context, params=params), [0] * context)
        seq.num_computed_tokens, seq.block_tables = context - num_queries, [table]
        plan.append(Scheduled(seq, num_queries, 0, samples=True))
    return BatchBuilder(torch.device("cpu")).build(StepBuilder(BLOCK_SIZE, vocab_size=1).build(plan))


if __name__ == "__main__":
    main()
