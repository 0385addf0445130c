"""Products with quantised matrices: against their definition, the bytes of the codes, and others' kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import kernels.reference.moe
from kernels.reference.quantized import quantize_rows, round_to_groups, scaled_linear
from kernels.triton.configs import chip_of, strict_quantized_config
from kernels.triton.layers.quantized_moe import mix_quantized_experts
from kernels.triton.quantized import rows, scaled, scaled_matrix
from kernels.triton.quantized.linear import quantized_linear
from kernels.triton.quantized.matrix import QuantizedMatrix, make_matrix
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.quantized_peers import GROUP, PEERS, Multiply
from loadtest.gpu.records import Check, Problem, Record, Timing
from loadtest.gpu.shapes import LLAMA_8B, TINY
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

_SCALED = {"int8": torch.int8, "FP8": torch.float8_e4m3fn}
_ROUNDED_TO_FP8 = 0.02  # of values: what lies between two of them may go to either
FIRST_FP8 = (8, 9)  # compute capability


def checks(context: Context) -> list[Job]:
    dtypes = [torch.float32] if context.is_rehearsal else list(BOUNDS)
    bits = (4,) if context.is_rehearsal else range(1, 9)
    found = [
        Job(f"quantised, {number} bits, {name_of(dtype)}", partial(_check, context, number, dtype))
        for number in bits
        for dtype in dtypes
    ]
    found += [Job(f"floats of 4 bits, {name_of(dtype)}", partial(_check_floats, context, dtype)) for dtype in dtypes]
    found += [Job(f"quantised experts, {name_of(dtype)}", partial(_check_experts, context, dtype)) for dtype in dtypes]
    return [*found, *(Job(f"{name} by {name}", partial(_check_scaled, context, name)) for name in _SCALED)]


def _check(context: Context, bits: int, dtype: torch.dtype) -> Iterator[Record]:
    generator, device = context.generator(f"quantised {bits} {dtype}"), context.device
    shapes = [(40, 128)] if context.is_rehearsal else [(960, 576), (4096, 4096), (1000, 14336)]
    for num_outputs, num_inputs in shapes:
        for group_size in (32, 64, 128, num_inputs):
            if num_inputs % group_size:
                continue
            matrix = random_matrix(num_outputs, num_inputs, bits, group_size, generator)
            dense = matrix.dense().double()
            for num_rows in (3,) if context.is_rehearsal else (1, 16, 33, 300):
                x = torch.randn(num_rows, num_inputs, device=device, generator=generator).to(dtype)
                with poisoned_memory():
                    found = quantized_linear(x, matrix)
                title = f"{bits} bits, groups of {group_size}, {num_outputs} x {num_inputs}, {num_rows} rows"
                error = relative_error(found, x.double() @ dense.T)
                yield Check(f"quantised, {title}, {name_of(dtype)}", error, 2 * BOUNDS[dtype])
            config = strict_quantized_config(dtype, chip=chip_of(device))
            whole, alone = (quantized_linear(part, matrix, config=config) for part in (x, x[:1]))
            num_others = float((whole[:1] != alone).sum())
            yield Check(f"a row alone, {bits} bits, groups of {group_size}, {name_of(dtype)}", num_others, 0.0)


def _check_floats(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    generator, device = context.generator(f"floats {dtype}"), context.device
    num_outputs, num_inputs = (40, 128) if context.is_rehearsal else (4096, 4096)
    codes = torch.randint(16, (num_outputs, num_inputs), device=device, generator=generator, dtype=torch.uint8)
    for name, group_size, kind in (("NVFP4", 16, torch.float8_e4m3fn), ("MXFP4", 32, torch.float8_e8m0fnu)):
        powers = torch.randint(-4, 5, (num_outputs, num_inputs // group_size), device=device, generator=generator)
        matrix = make_matrix(codes, (2.0**powers).to(kind), bits=4, group_size=group_size, values="e2m1")
        x = torch.randn(5, num_inputs, device=device, generator=generator).to(dtype)
        expected = x.double() @ matrix.dense().double().T
        yield Check(f"{name}, {name_of(dtype)}", relative_error(quantized_linear(x, matrix), expected), BOUNDS[dtype])


def _check_experts(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    generator, device = context.generator(f"quantised experts {dtype}"), context.device
    num_experts, hidden_size, size = (3, 128, 64) if context.is_rehearsal else (16, 2048, 768)
    gate_up, down = (
        random_matrix(num_experts * shape[0], shape[1], 4, 64, generator, scale=shape[1] ** -0.5)
        for shape in ((2 * size, hidden_size), (hidden_size, size))
    )
    stacks = [one.dense().double().view(num_experts, -1, one.num_inputs) for one in (gate_up, down)]
    for num_tokens in (5,) if context.is_rehearsal else (1, 70, 1500):
        x = torch.randn(num_tokens, hidden_size, device=device, generator=generator).to(dtype)
        logits = torch.randn(num_tokens, num_experts, device=device, generator=generator)
        weights, experts = kernels.reference.moe.route(logits, 2, normalise=True)
        with poisoned_memory():
            found = mix_quantized_experts(x, gate_up, down, weights, experts)
        expected = kernels.reference.moe.mix_experts(x.double(), stacks[0], stacks[1], weights, experts)
        title = f"quantised experts, {num_tokens} tokens, {name_of(dtype)}"
        yield Check(title, relative_error(found, expected), 3 * BOUNDS[dtype])


def _check_scaled(context: Context, name: str) -> Iterator[Record]:
    generator, device, dtype = context.generator(f"scaled {name}"), context.device, _SCALED[name]
    if not _has_products(device, name):
        yield Problem(f"{name} by {name}", "this chip has no such products")
        return
    num_outputs, num_inputs = (40, 256) if context.is_rehearsal else (4096, 4096)
    weight = torch.randn(num_outputs, num_inputs, device=device, generator=generator)
    values, scales = quantize_rows(weight, dtype)
    x = torch.randn(33, num_inputs, device=device, generator=generator)
    row_values, row_scales = rows.quantize_rows(x, dtype)
    expected_values, expected_scales = quantize_rows(x, dtype)
    yield Check(f"scales of rows, {name}", relative_error(row_scales[:, 0], expected_scales), 1e-6)
    share = float((row_values.float() != expected_values.float()).float().mean())
    yield Check(f"values of rows, {name}", share, _ROUNDED_TO_FP8)
    blocks = torch.rand(-(-num_outputs // 128), -(-num_inputs // 128), device=device, generator=generator)
    for kind, factors in (("outputs", scales[:, None]), ("blocks", blocks)):
        matrix = scaled_matrix.make_scaled_matrix(values, factors)
        with poisoned_memory():
            found = scaled.scaled_linear(x, matrix)
        in_groups = rows.quantize_rows(x, dtype, in_groups=matrix.is_blocked)
        spread = in_groups[1].repeat_interleave(128 if matrix.is_blocked else num_inputs, 1)[:, :num_inputs]
        ones = torch.ones(len(x), device=device)
        expected = scaled_linear(in_groups[0].double() * spread.double(), ones, values, factors)
        yield Check(f"{name} by {name}, scales of {kind}", relative_error(found, expected), 1e-3)


def timings(context: Context) -> list[Job]:
    shape, num_rows = (TINY, (2,)) if context.is_rehearsal else (LLAMA_8B, (1, 8, 16, 64, 256, 4096))
    width, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    sizes = {
        "qkv": (heads + 2 * shape.num_kv_heads * shape.head_dim, width),
        "attention output": (width, heads),
        "gate and up": (2 * shape.intermediate_size, width),
        "down": (width, shape.intermediate_size),
    }
    formats = {"int4, groups of 128": (4, 128), "int4, groups of 32": (4, 32), "int8, groups of 128": (8, 128)}
    if context.is_rehearsal:
        formats = {"int4, groups of 32": (4, 32)}
    found = []
    for kind, (bits, group_size) in formats.items():
        for name, size in sizes.items():
            for number in num_rows:
                title = f"{kind}, {name}, {number} rows"
                found.append(Job(title, partial(_time, context, title, size, number, bits, group_size)))
    for name in _SCALED:
        for number in num_rows:
            title = f"{name} by {name}, gate and up, {number} rows"
            found.append(Job(title, partial(_time_scaled, context, title, sizes["gate and up"], number, name)))
    return found


def _time(
    context: Context, title: str, size: tuple[int, int], num_rows: int, bits: int, group_size: int
) -> Iterator[Record]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    generator, device = context.generator(title), context.device
    first = random_matrix(*size, bits, group_size, generator)
    count = 1 if context.is_rehearsal else num_sets(first.nbytes, l2_bytes(device))
    matrices = [first, *(random_matrix(*size, bits, group_size, generator) for _ in range(1, count))]
    x = torch.randn(num_rows, size[1], device=device, generator=generator).to(dtype)
    floats = [matrix.dense().to(dtype) for matrix in matrices]
    works: dict[str, Work] = {
        "": lambda index: quantized_linear(x, matrices[index]),
        f"torch, {name_of(dtype)}": lambda index: F.linear(x, floats[index]),
    }
    if (bits, group_size) == (4, GROUP):
        for name, make in PEERS.items():
            try:
                layers = [make(*size) for _ in range(count)]
                layers[0](x)
            except Exception as error:  # whatever another project's code raises
                yield Problem(f"{name}, {title}", f"{type(error).__name__}: {error}")
            else:
                works[name] = partial(_call, layers, x)
    seconds = Stopwatch(device).compare(works, num_sets=count)
    num_bytes = first.nbytes + dtype.itemsize * num_rows * sum(size)
    floor = context.floor(num_bytes=num_bytes, num_flops=2 * num_rows * size[0] * size[1])
    yield Timing(title, seconds.pop(""), floor, peers=seconds)


def _call(layers: list[Multiply], x: torch.Tensor, index: int) -> torch.Tensor:
    return layers[index](x)


def _time_scaled(context: Context, title: str, size: tuple[int, int], num_rows: int, name: str) -> Iterator[Record]:
    generator, device = context.generator(title), context.device
    if not _has_products(device, name):
        yield Problem(title, "this chip has no such products")
        return
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    weight = torch.randn(*size, device=device, generator=generator)
    values, scales = quantize_rows(weight, _SCALED[name])
    count = 1 if context.is_rehearsal else num_sets(values.nbytes, l2_bytes(device))
    matrices = [scaled_matrix.ScaledMatrix(values.clone(), scales[:, None]) for _ in range(count)]
    floats = [weight.to(dtype) for _ in range(count)]
    x = torch.randn(num_rows, size[1], device=device, generator=generator).to(dtype)
    works: dict[str, Work] = {
        "": lambda index: scaled.scaled_linear(x, matrices[index]),
        f"torch, {name_of(dtype)}": lambda index: F.linear(x, floats[index]),
    }
    seconds = Stopwatch(device).compare(works, num_sets=count)
    num_bytes = values.nbytes + dtype.itemsize * num_rows * sum(size)
    floor = context.floor(num_bytes=num_bytes, num_flops=num_rows * size[0] * size[1])  # twice bfloat16's rate
    yield Timing(title, seconds.pop(""), floor, peers=seconds)


def _has_products(device: torch.device, name: str) -> bool:
    return name == "int8" or device.type == "cpu" or torch.cuda.get_device_capability(device) >= FIRST_FP8


def random_matrix(
    num_outputs: int, num_inputs: int, bits: int, group_size: int, generator: torch.Generator, *, scale: float = 1.0
) -> QuantizedMatrix:
    """Rounded from normally distributed floats, which are multiplied by `scale` before."""
    weight = scale * torch.randn(num_outputs, num_inputs, device=generator.device, generator=generator)
    codes, scales, zeros = round_to_groups(
        weight, bits=max(2, bits), group_size=group_size, is_symmetric=False, scale_dtype=torch.bfloat16
    )
    most = 2**bits - 1
    return make_matrix(codes.clamp(max=most), scales, zeros.clamp(max=most), bits=bits, group_size=group_size)
