"""What does compiled attention take with each way to keep keys and values? `python -m loadtest.micro.kv_codecs`

Microseconds of processor time per layer of SmolLM2-135M's shapes, over all of its 30 layers in turn, so that a long
context comes from memory and not from a cache; and the ratio to the first codec: the median of rounds in which all
codecs take turns, as the machine's speed changes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.codec import make_codec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.numba.program.team import Team
from loadtest.micro.attention import BLOCK_SIZE, LAYER, make_batch
from loadtest.micro.measure import Row, parse_numbers, print_table, save

NUM_LAYERS = 30
STEPS = [(1, 1), (1, 4), (8, 1), (1, 128)]  # sequences, new tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", default="float16,int8")
    parser.add_argument("--contexts", type=parse_numbers, default=[128, 1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codecs, rows = options.codecs.split(","), []
    with torch.inference_mode():
        for context in options.contexts:
            for step in STEPS:
                rows.append(measure(*step, context, codecs, num_rounds=options.rounds, num_threads=options.threads))
                print_table(rows[-1:])
    if options.save:
        print(f"\n{save(f'kv-codecs-{options.threads}t', rows)}")


def measure(
    num_seqs: int, num_queries: int, context: int, codecs: list[str], *, num_rounds: int, num_threads: int
) -> Row:
    batch = make_batch(num_seqs, num_queries, context)
    layers = [replace(LAYER, index=index) for index in range(NUM_LAYERS)]
    team = Team(num_threads, scratch_bytes=scratch_bytes(layers, BLOCK_SIZE))
    backends = [_backend(name, layers, batch, team) for name in codecs]
    q, k, v = (torch.randn(num_seqs * num_queries, heads, LAYER.head_dim) for heads in (9, 3, 3))
    seconds: list[list[float]] = [[] for _ in codecs]
    for _ in range(num_rounds + 1):
        for backend, times in zip(backends, seconds, strict=True):
            start = time.process_time()
            _attend(backend, q, k, v, batch)
            times.append((time.process_time() - start) / NUM_LAYERS)
    rounds = [times[1:] for times in seconds]  # the first touches new memory
    row: Row = {"seqs": num_seqs, "new": num_queries, "context": context}
    row |= {f"{name}, us": 1e6 * median(times) for name, times in zip(codecs, rounds, strict=True)}
    for name, times in list(zip(codecs, rounds, strict=True))[1:]:
        ratio = median(own / first for own, first in zip(times, rounds[0], strict=True))
        row[f"{name} / {codecs[0]}"] = f"{ratio:.2f}"
    return row


def _backend(name: str, layers: list[AttentionLayer], batch: ForwardBatch, team: Team) -> NumbaAttention:
    num_blocks = int(batch.block_tables[0].max()) + 1
    codec = make_codec(name, keys_as_columns=True)
    cache = KVCache(layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=codec)
    slots = torch.arange(num_blocks * BLOCK_SIZE)
    for layer in layers:
        k, v = torch.randn(2, len(slots), layer.num_kv_heads, layer.head_dim)
        codec.write(cache.memory(layer.index), layer, slots, k, v)
    return NumbaAttention(cache, team)


def _attend(backend: NumbaAttention, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
    backend.plan(batch)
    for index in range(NUM_LAYERS):
        backend(q, k, v, replace(LAYER, index=index), batch)


if __name__ == "__main__":
    main()
