"""What does a decoding step cost here, and where? `python -m loadtest.micro.decode [--threads 2] [--save]`

Milliseconds of one forward pass and its logits, for a random model of SmolLM2-135M's shapes: every sequence has a
context of 128 tokens and decodes one. The floor is the weights and the keys and values, read once at the speed that
this machine reads memory.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from engine.attention.torch_backend import TorchAttention
from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.storage import KVCache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.planning.ceilings import measure_ceilings
from engine.quantization.linear import exchange_linears
from engine.quantization.method import FORMATS, has_fast_bf16, has_float16_weights, make_methods
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence
from loadtest.micro.measure import Row, fastest, parse_arguments, report

CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
BLOCK_SIZE = 16
CONTEXT = 128
BATCHES = [1, 8, 32]
WEIGHT_BYTES = {"none": 4, "fp16": 2, "int8": 1}


def main() -> None:
    arguments = parse_arguments(main.__doc__ or __doc__ or "")
    variants = [(torch.float32, "none"), (torch.float32, "int8")]
    variants += [(torch.float32, "fp16")] if has_float16_weights() else []
    variants += [(torch.bfloat16, "none"), (torch.bfloat16, "int8")] if has_fast_bf16() else []
    bytes_per_second, _ = measure_ceilings(arguments.threads)
    with torch.inference_mode():
        rows = [row for variant in variants for row in _measure(*variant, bytes_per_second, arguments.threads)]
    report("decode", rows, arguments)


def _measure(dtype: torch.dtype, quantization: str, bytes_per_second: float, num_threads: int) -> list[Row]:
    model = build_model(CONFIG, dtype=dtype)
    num_parameters = 0
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
        num_parameters += parameter.numel()
    exchange_linears(model, make_methods(FORMATS, quantization), num_threads=num_threads)
    weight_bytes = num_parameters * min(WEIGHT_BYTES[quantization], dtype.itemsize)
    kv_bytes = KVCache.bytes_per_token(model.attention_layers, dtype) * CONTEXT
    rows: list[Row] = []
    for num_seqs in BATCHES:
        seconds = _seconds_per_step(model, num_seqs, dtype)
        floor = (weight_bytes + num_seqs * kv_bytes) / bytes_per_second
        name = str(dtype).removeprefix("torch.")
        rows.append(
            {"dtype": name, "format": quantization, "batch": num_seqs, "ms": 1e3 * seconds, "floor ms": 1e3 * floor}
        )
    return rows


def _seconds_per_step(model: Model, num_seqs: int, dtype: torch.dtype) -> float:
    batch = decode_batch(num_seqs)
    num_blocks = num_seqs * CONTEXT // BLOCK_SIZE
    cache = KVCache(model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(dtype))
    attention = TorchAttention(cache)

    def step(_: int) -> None:
        attention.plan(batch)
        model.compute_logits(model(batch, attention)[batch.logits_rows])

    return fastest(step, num_calls=3)


def decode_batch(num_seqs: int) -> ForwardBatch:
    """Every sequence decodes the last token of its context; the blocks lie in no order."""
    tables = torch.randperm(num_seqs * CONTEXT // BLOCK_SIZE).view(num_seqs, -1)
    plan = []
    for table in tables.tolist():
        params = SamplingParams(seed=0, max_tokens=1)
        seq = Sequence(Request(request_id="", prompt_token_ids=[1] * CONTEXT, params=params), [1] * CONTEXT)
        seq.num_computed_tokens, seq.block_tables = [CONTEXT - 1, table]
        plan.append(Scheduled(seq, 1, 0, samples=True))
    return BatchBuilder(torch.device("cpu")).build(StepBuilder(BLOCK_SIZE, vocab_size=1).build(plan))


if __name__ == "__main__":
    main()
