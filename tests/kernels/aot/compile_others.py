"""Compiles the kernels around attention for one chip: `python compile_others.py 90 all` prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
from offline_compiler import Compiled, compile_for

from kernels.triton.configs import moe_config
from kernels.triton.layers.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from kernels.triton.layers.moe import mix_experts, route
from kernels.triton.layers.norm import add_rms_norm, rms_norm
from kernels.triton.layers.qkv import rotate_and_store
from kernels.triton.sampling.grammar_masks import apply_masks
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.token_scores import penalise, score_tokens

BFLOAT16 = torch.bfloat16


def norms() -> None:
    x, weight = torch.empty(4, 4096, dtype=BFLOAT16), torch.empty(4096, dtype=BFLOAT16)
    add_rms_norm(x, x, weight, 1e-5)
    rms_norm(x.view(4, 32, 128), weight[:128], 1e-5)


def activations() -> None:
    gate_up = torch.empty(4, 28_672, dtype=BFLOAT16)
    silu_and_mul(gate_up)
    gelu_and_mul(gate_up)
    gelu_tanh_and_mul(gate_up)


def qkv() -> None:
    cache = torch.empty(4, 8, 2, 16, 128, dtype=BFLOAT16).unbind(2)
    heads, factors = torch.empty(4, 48, 128, dtype=BFLOAT16), torch.empty(4, 128, dtype=BFLOAT16)
    slots, weight = torch.zeros(4, dtype=torch.int64), torch.empty(128, dtype=BFLOAT16)
    rotate_and_store(heads, factors, factors, cache[0], cache[1], slots, num_heads=32)
    norms = {"q_weight": weight, "k_weight": weight}
    rotate_and_store(heads, factors, factors, cache[0], cache[1], slots, num_heads=32, **norms)
    norms = {"q_weight": weight.repeat(32), "k_weight": weight.repeat(8)}
    rotate_and_store(heads, factors, factors, cache[0], cache[1], slots, num_heads=32, **norms)
    rotate_and_store(heads, None, None, cache[0], cache[1], slots, num_heads=32)
    has_fp8 = int(sys.argv[1]) >= 89
    for codes in (torch.int8, *([torch.float8_e4m3fn] if has_fp8 else [])):
        elements, scales = torch.empty(4, 8, 2, 16 * (128 + 4), dtype=torch.uint8).split([16 * 128, 16 * 4], dim=-1)
        parts = elements.view(codes).unflatten(-1, (16, 128)).unbind(2)
        named = dict(zip(("k_scales", "v_scales"), scales.view(torch.float32).unbind(2), strict=True))
        rotate_and_store(heads, factors, factors, *parts, slots, num_heads=32, **named)


def sampling() -> None:
    floats, ids = torch.empty(4), torch.zeros(4, dtype=torch.int64)
    keys = torch.zeros(4, 2, dtype=torch.int32)
    logits, counts = torch.empty(4, 128_256), torch.zeros(4, 128_256, dtype=torch.int32)
    sample_tokens(logits, floats, keys, floats, ids, floats.double())
    penalise(logits, counts, counts.bool(), ids, floats, floats.double(), floats.double())
    score_tokens(logits, ids)
    apply_masks(logits, ids, torch.empty(len(ids), logits.shape[1] // 32 + 1, dtype=torch.int32))


def moe_decode() -> None:
    _mixtral(num_tokens=8)


def moe_prompt() -> None:
    _mixtral(num_tokens=256)


def _mixtral(num_tokens: int) -> None:
    """The sizes that matter to the compiler; the experts' are cut down, for they would fill the memory."""
    route(torch.empty(num_tokens, 8, dtype=BFLOAT16), 2, normalise=True)
    x, weights = torch.empty(num_tokens, 4096, dtype=BFLOAT16), torch.empty(num_tokens, 2)
    gate_up, down = torch.empty(8, 512, 4096, dtype=BFLOAT16), torch.empty(8, 4096, 256, dtype=BFLOAT16)
    config = moe_config(num_tokens // 4, BFLOAT16, chip=f"sm_{sys.argv[1]}")
    mix_experts(x, gate_up, down, weights, torch.zeros(num_tokens, 2, dtype=torch.int64), config=config)


CASES = {
    "norms": norms,
    "activations": activations,
    "qkv": qkv,
    "sampling": sampling,
    "moe decode": moe_decode,
    "moe prompt": moe_prompt,
}

if __name__ == "__main__":
    results: list[Compiled] = []
    for name, launch in CASES.items():
        with compile_for(int(sys.argv[1]), name, results):
            launch()
    print(json.dumps([dataclasses.asdict(result) for result in results]))
