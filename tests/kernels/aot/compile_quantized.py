"""Compiles products with quantised matrices for one chip: `python compile_quantized.py 90 int4` prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import torch
from offline_compiler import Compiled, compile_for

from kernels.triton.configs import quantized_config, quantized_moe_config, scaled_config, strict_quantized_config
from kernels.triton.layers.quantized_moe import mix_quantized_experts
from kernels.triton.quantized.linear import quantized_linear
from kernels.triton.quantized.matrix import QuantizedMatrix, Scales, Values
from kernels.triton.quantized.packing import words_shape
from kernels.triton.quantized.rows import quantize_rows
from kernels.triton.quantized.scaled import scaled_linear
from kernels.triton.quantized.scaled_matrix import ScaledMatrix

ARCH, CASES = int(sys.argv[1]), sys.argv[2]
CHIP = f"sm_{ARCH}"
BFLOAT16 = torch.bfloat16
LLAMA = {"qkv": (6144, 4096), "down": (4096, 14336)}  # of Llama-3.1-8B; other products have the same specialisations
SMOLLM = {"qkv": (960, 576), "gate and up": (3072, 576), "logits": (49152, 576)}  # tiles that inputs do not fill
ROWS = {"few": 4, "some": 48, "many": 512}
_TYPES = {
    "float16": torch.int32,
    "bfloat16": torch.int32,
    "float32": torch.float32,
    "e4m3": torch.uint8,
    "e8m0": torch.uint8,
}


def matrix_of(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    kind: Scales = "bfloat16",
    values: Values = "integer",
    *,
    has_offsets: bool = False,
) -> QuantizedMatrix:
    num_outputs, num_inputs = shape
    groups = num_inputs // (group_size or num_inputs), num_outputs
    return QuantizedMatrix(
        words=torch.empty(words_shape(num_outputs, num_inputs, bits), dtype=torch.int32),
        scales=torch.empty(groups, dtype=_TYPES[kind]),
        bits=bits,
        num_inputs=num_inputs,
        group_size=group_size,
        scale_kind=kind,
        values=values,
        offsets=torch.empty(groups) if has_offsets else None,
        channel_scales=torch.empty(num_outputs) if values == "e2m1" else None,
        table=torch.empty(16) if values == "table" else None,
    )


def multiply(name: str, matrix: QuantizedMatrix, *, buckets: tuple[str, ...] = tuple(ROWS)) -> Iterator[str]:
    for bucket in buckets:
        for dtype in (BFLOAT16, torch.float16):
            yield f"{name}, {bucket} rows, {dtype}"
            x = torch.empty(ROWS[bucket], matrix.num_inputs, dtype=dtype)
            quantized_linear(x, matrix, config=quantized_config(ROWS[bucket], dtype, chip=CHIP))


def short() -> Iterator[str]:
    for bits, group_size in ((4, 128), (4, 32), (8, 128)):
        matrix = matrix_of(LLAMA["qkv"], bits, group_size)
        for bucket in ROWS:
            yield f"llama qkv, int{bits}, groups of {group_size}, {bucket} rows, {BFLOAT16}"
            x = torch.empty(ROWS[bucket], matrix.num_inputs, dtype=BFLOAT16)
            quantized_linear(x, matrix, config=quantized_config(ROWS[bucket], BFLOAT16, chip=CHIP))


def int4() -> Iterator[str]:
    for name, shape in LLAMA.items():
        for group_size in (128, 32):
            yield from multiply(f"llama {name}, int4, groups of {group_size}", matrix_of(shape, 4, group_size))
    for name, shape in SMOLLM.items():
        yield from multiply(f"smollm {name}, int4", matrix_of(shape, 4, 32), buckets=("few", "many"))


def int8() -> Iterator[str]:
    yield from multiply("llama qkv, int8", matrix_of(LLAMA["qkv"], 8, 128))
    yield from multiply("smollm logits, int8", matrix_of(SMOLLM["logits"], 8, 64), buckets=("few",))


def bits() -> Iterator[str]:
    for number in (2, 3, 5, 6, 7):
        yield from multiply(f"llama qkv, int{number}", matrix_of(LLAMA["qkv"], number, 128))


def scales() -> Iterator[str]:
    for group_size, kind in ((16, "float16"), (64, "float32"), (128, "float32"), (0, "bfloat16"), (0, "float32")):
        yield from multiply(f"llama qkv, groups of {group_size}, {kind}", matrix_of(LLAMA["qkv"], 4, group_size, kind))
    for group_size in (32, 128, 0):
        matrix = matrix_of(LLAMA["qkv"], 4, group_size, "float32", has_offsets=True)
        yield from multiply(f"llama qkv, groups of {group_size}, offsets", matrix)


def floats() -> Iterator[str]:
    yield from multiply("llama qkv, NVFP4", matrix_of(LLAMA["qkv"], 4, 16, "e4m3", "e2m1"))
    yield from multiply("llama qkv, MXFP4", matrix_of(LLAMA["qkv"], 4, 32, "e8m0", "e2m1"))
    yield from multiply("llama qkv, NF4", matrix_of(LLAMA["qkv"], 4, 64, "float32", "table"))
    yield from multiply("llama qkv, e4m3", matrix_of(LLAMA["qkv"], 8, 128, "float32", "e4m3"))


def others() -> Iterator[str]:
    matrix = matrix_of(LLAMA["qkv"], 4, 128)
    for dtype in (BFLOAT16, torch.float32):
        yield f"strict, {dtype}"
        config = strict_quantized_config(dtype, chip=CHIP)
        quantized_linear(torch.empty(20, 4096, dtype=dtype), matrix, torch.empty(6144, dtype=dtype), config=config)


def experts() -> Iterator[str]:
    for name, num_tokens in (("few", 8), ("many", 512)):
        for group_size in (128, 32):
            yield f"experts, {name} rows, groups of {group_size}"
            gate_up, down = matrix_of((8 * 512, 4096), 4, group_size), matrix_of((8 * 4096, 256), 4, group_size)
            x, weights = torch.empty(num_tokens, 4096, dtype=BFLOAT16), torch.empty(num_tokens, 2)
            config = quantized_moe_config(num_tokens // 4, BFLOAT16, chip=CHIP)
            chosen = torch.zeros(num_tokens, 2, dtype=torch.int64)
            mix_quantized_experts(x, gate_up, down, weights, chosen, config=config)


def scaled() -> Iterator[str]:
    shape = LLAMA["down"]
    for dtype in (torch.int8, torch.float8_e4m3fn) if ARCH >= 89 else (torch.int8,):
        for name, scales in (("outputs", (shape[0], 1)), ("blocks", (shape[0] // 128, shape[1] // 128))):
            for bucket in ("few", "many"):
                yield f"{dtype}, {bucket} rows, scales of {name}"
                matrix = ScaledMatrix(torch.empty(shape, dtype=dtype), torch.empty(scales))
                x = torch.empty(ROWS[bucket], shape[1], dtype=BFLOAT16)
                scaled_linear(x, matrix, config=scaled_config(ROWS[bucket], chip=CHIP))
        yield f"{dtype}, rows alone"
        quantize_rows(torch.empty(4, 576, dtype=BFLOAT16), dtype)


if __name__ == "__main__":
    results: list[Compiled] = []
    launches, previous = globals()[CASES](), ""
    while True:
        found: list[Compiled] = []
        with compile_for(ARCH, "", found):
            name = next(launches, None)  # runs on from `previous`
        results += [dataclasses.replace(one, case=previous) for one in found]
        if name is None:
            break
        previous = name
    print(json.dumps([dataclasses.asdict(result) for result in results]))
