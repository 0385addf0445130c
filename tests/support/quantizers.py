"""Matrices in the layouts of published checkpoints, packed by numpy bit by bit, and what they stand for.

Independent of the code that reads them: integers become a stream of bits, small floats come from a table of all of
their codes, and weights are products in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Quantized = tuple[dict[str, Tensor], Array]  # tensors by the last words of their names; float64 [num_rows, depth]
Quantize = Callable[[str, int, int], Quantized]  # of a layer, by its name, rows and depth


def pack_bits(values: Array, bits: int) -> Array:
    """[any, count] below 2^bits -> int32 [any, words], the lowest bits first, zeros at the end."""
    stream = (values[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64) & np.uint64(1)).astype(np.uint8)
    stream = stream.reshape(values.shape[0], -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def gptq(
    bits: int,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    version: int = 1,
    order: str = "none",
    scale_dtype: type = np.float16,
    seed: int = 0,
) -> Quantize:
    """order: "none" has no g_idx, "even" one of neighbours, "shuffled" one of activation order, the same for all layers
    of one depth; "own" another for each"""

    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([seed, *name.encode()])
        size = depth if group_size <= 0 else group_size
        groups = -(-depth // size)
        q = rng.integers(0, 1 << bits, (depth, num_rows))
        half = 1 << (bits - 1)
        spread = max(1, half // 2)
        zeros = rng.integers(half - spread, half + spread, (groups, num_rows))
        if symmetric:
            zeros = np.full_like(zeros, half)
        scales = (rng.uniform(0.5, 1.0, (groups, num_rows)) * 3 / depth**0.5 / (1 << bits)).astype(scale_dtype)
        index = np.arange(depth) // size
        if order == "shuffled":
            index = np.random.default_rng(depth).permutation(index)
        if order == "own":
            index = rng.permutation(index)
        tensors = {
            "qweight": pack_bits(q.T, bits).T,
            "qzeros": pack_bits(zeros - (version == 1), bits),
            "scales": scales,
        }
        if order != "none":
            tensors["g_idx"] = index.astype(np.int32)
        dense = (q - zeros[index]) * scales.astype(np.float64)[index]
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}, dense.T

    return quantize


def awq(bits: int = 4, *, group_size: int = 32, seed: int = 0) -> Quantize:
    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([seed, *name.encode()])
        size = depth if group_size <= 0 else group_size
        groups = -(-depth // size)
        levels, half = 1 << bits, 1 << (bits - 1)
        q = rng.integers(0, levels, (depth, num_rows))
        zeros = rng.integers(half // 2, half + half // 2, (groups, num_rows))
        scales = (rng.uniform(0.5, 1.0, (groups, num_rows)) * 3 / depth**0.5 / levels).astype(np.float16)
        index = np.arange(depth) // size
        dense = (q - zeros[index]) * scales.astype(np.float64)[index]
        packed = [_interleaved(values) if bits == 4 else pack_bits(values, bits) for values in (q, zeros)]
        tensors = {"qweight": packed[0], "qzeros": packed[1], "scales": scales}
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}, dense.T

    return quantize


def _interleaved(values: Array) -> Array:
    """AWQ's order: [any, count] -> int32 [any, count / 8]."""
    words = values.reshape(values.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return pack_bits(words.reshape(values.shape), 4)


def compressed_integers(
    bits: int,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    padded: bool = False,
    ordered: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantize:
    """compressed-tensors' pack-quantized. padded: words hold whole integers, as before May 2026"""

    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([*name.encode()])
        size = depth if group_size <= 0 else group_size
        groups = depth // size
        q, half = rng.integers(0, 1 << bits, (num_rows, depth)), 1 << (bits - 1)
        zeros = rng.integers(half - half // 2, half + half // 2, (num_rows, groups))
        if symmetric:
            zeros[:] = half
        scales = _scales(rng, (num_rows, groups), depth, 1 << bits, dtype)
        index = np.arange(depth) // size
        if ordered:
            index = np.random.default_rng(depth).permutation(index)
        pack = pack_padded_bits if padded else pack_bits
        tensors: dict[str, Array] = {"weight_packed": pack(q, bits), "weight_shape": np.array([num_rows, depth])}
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.T, bits).T
        if ordered:
            tensors["weight_g_idx"] = index.astype(np.int32)
        dense = (q - zeros[:, index]) * scales.double().numpy()[:, index]
        return _tensors(tensors) | {"weight_scale": scales}, dense

    return quantize


def eight_bit_integers(
    *, scales: str = "rows", symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Quantize:
    """compressed-tensors' int-quantized. scales: of the "matrix", its "rows", or "groups" of 64"""

    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([*name.encode()])
        q = rng.integers(-128, 128, (num_rows, depth))
        shape = {"matrix": (1, 1), "rows": (num_rows, 1), "groups": (num_rows, depth // 64)}[scales]
        found = _scales(rng, shape, depth, 256, dtype)
        zeros = np.zeros(shape, np.int8) if symmetric else rng.integers(-3, 4, shape).astype(np.int8)
        wide = np.repeat(zeros.astype(np.int64), depth // shape[1], 1)
        dense = (q - wide) * np.repeat(found.double().numpy(), depth // shape[1], 1)
        tensors: dict[str, Array] = {"weight": q.astype(np.int8)}
        if not symmetric:
            tensors["weight_zero_point"] = zeros
        return _tensors(tensors) | {"weight_scale": found.reshape(1) if scales == "matrix" else found}, dense

    return quantize


def eight_bit_floats(
    *, block: tuple[int, int] | None = None, rows: bool = False, name: str = "weight_scale", exponents: bool = False
) -> Quantize:
    """float8_e4m3fn with one scale in float32, or of rows, or of blocks. exponents: scales are powers of two, E8M0"""

    def quantize(layer: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([*layer.encode()])
        codes = rng.choice(np.flatnonzero(np.isfinite(E4M3)), (num_rows, depth)).astype(np.uint8)
        height, width = block or ((1, depth) if rows else (num_rows, depth))
        shape = (-(-num_rows // height), -(-depth // width))
        scales = (rng.uniform(0.5, 1, shape) / 100 / depth**0.5).astype(np.float32)
        stored: Tensor = torch.from_numpy(scales)
        if exponents:
            powers = rng.integers(112, 118, shape).astype(np.uint8)
            scales, stored = 2.0 ** (powers.astype(np.float64) - 127), torch.from_numpy(powers)
        wide = np.repeat(np.repeat(scales, height, 0), width, 1)[:num_rows, :depth]
        if shape == (1, 1) and block is None:
            stored = stored.reshape(())
        weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return {"weight": weight, name: stored}, E4M3[codes] * wide.astype(np.float64)

    return quantize


def mxfp4(name: str, num_rows: int, depth: int) -> Quantized:
    rng = np.random.default_rng([*name.encode()])
    codes = rng.integers(0, 16, (num_rows, depth))
    powers = rng.integers(120, 125, (num_rows, depth // 32)).astype(np.uint8)
    scales = np.repeat(2.0 ** (powers.astype(np.float64) - 127), 32, 1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return _tensors({"weight_packed": packed.astype(np.uint8), "weight_scale": powers}), E2M1[codes] * scales


def nvfp4(*, of_modelopt: bool = False) -> Quantize:
    """compressed-tensors' number for all divides, ModelOpt's multiplies."""

    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([*name.encode()])
        codes, factors = rng.integers(0, 16, (num_rows, depth)), rng.integers(0x40, 0x70, (num_rows, depth // 16))
        whole = np.float32(rng.uniform(300, 600))
        fine = E4M3[factors].astype(np.float32)
        scales = fine * (np.float32(1) / whole) if of_modelopt else fine / whole
        dense = E2M1[codes] * np.repeat(scales.astype(np.float64), 16, 1)
        packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
        found = torch.from_numpy(factors.astype(np.uint8)).view(torch.float8_e4m3fn)
        if of_modelopt:
            one = torch.tensor(np.float32(1) / whole)
            return {"weight": packed, "weight_scale": found, "weight_scale_2": one}, dense
        return {"weight_packed": packed, "weight_scale": found, "weight_global_scale": torch.tensor([whole])}, dense

    return quantize


NF4 = np.array(  # of QLoRA's paper, appendix E
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1], np.float32,
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


def book_of_four_bits(kind: str = "nf4", *, nested: bool = False, is_own: bool = False) -> Quantize:
    """bitsandbytes' 4 bits, blocks of 64 weights. is_own: the book is nobody else's"""

    def quantize(name: str, num_rows: int, depth: int) -> Quantized:
        rng = np.random.default_rng([*name.encode()])
        codes, book = rng.integers(0, 16, num_rows * depth), {"nf4": NF4, "fp4": FP4}[kind].copy()
        if is_own:
            book = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        blocks = num_rows * depth // 64
        factors = (rng.uniform(0.5, 1, blocks) * 2 / depth**0.5).astype(np.float32)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [num_rows, depth]}
        tensors: dict[str, Array] = {"weight.absmax": factors}
        if nested:
            inner, places = rng.uniform(-1, 1, 256).astype(np.float32), rng.integers(0, 256, blocks).astype(np.uint8)
            outer, offset = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32), 0.05
            factors = inner[places] * np.repeat(outer, 256)[:blocks] + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            tensors = {"weight.absmax": places, "weight.nested_absmax": outer, "weight.nested_quant_map": inner}
        packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        tensors |= {"weight": packed, "weight.quant_map": book, f"weight.quant_state.bitsandbytes__{kind}": text}
        dense = book[codes].astype(np.float64) * np.repeat(factors.astype(np.float64), 64)
        return _tensors(tensors), dense.reshape(num_rows, depth)

    return quantize


def bitsandbytes_integers(name: str, num_rows: int, depth: int) -> Quantized:
    rng = np.random.default_rng([*name.encode()])
    q, scales = rng.integers(-127, 128, (num_rows, depth)).astype(np.int8), rng.uniform(0.1, 0.3, num_rows)
    scb = scales.astype(np.float32)
    dense = (q.astype(np.float32) * scb[:, None]) * np.float32(7.874015718698502e-3)
    tensors = {"weight": q, "SCB": scb, "weight_format": np.array(0, np.uint8)}
    return _tensors(tensors), dense.astype(np.float64)


def pack_padded_bits(values: Array, bits: int) -> Array:
    """As `pack_bits`, each word with as many whole integers as it can hold."""
    in_word = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % in_word))).reshape(values.shape[0], -1, in_word)
    words = (padded.astype(np.uint64) << (np.arange(in_word) * bits).astype(np.uint64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def _scales(rng: np.random.Generator, shape: tuple[int, ...], depth: int, levels: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.uniform(0.5, 1.0, shape) * 3 / depth**0.5 / levels).to(dtype)


def _tensors(arrays: dict[str, Array]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


def _small_float(exponent_bits: int, mantissa_bits: int) -> Array:
    """The value of each code of a small float, with a sign, as IEEE 754 has them but for infinities."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa, exponent = codes & ((1 << mantissa_bits) - 1), codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    bias, fraction = (1 << (exponent_bits - 1)) - 1, mantissa / (1 << mantissa_bits)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    return np.where(codes >> (exponent_bits + mantissa_bits), -value, value)


E2M1, E4M3 = _small_float(2, 1), _small_float(4, 3)
E4M3[[0x7F, 0xFF]] = np.nan
