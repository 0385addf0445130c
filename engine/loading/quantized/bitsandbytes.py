"""bitsandbytes' layouts: 4-bit places in a code book (Dettmers et al., 2023), 8-bit integers (LLM.int8, 2022).

4 bits: the weights of a whole matrix in one row of bytes, the first in the upper half of a byte. Each `blocksize` of
them share a factor (absmax), which may itself be 8-bit places in a code book, with factors of their own and an offset.
weight = book[place] * absmax. 8 bits: weight = integer * SCB / 127, SCB a number for each row.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.loading.quantized.matrix_header import (
    Headers,
    MatrixHeader,
    Tensors,
    expect_dimensions,
    expect_dtype,
    expect_finite,
    expect_shape,
    fits_chunks,
    kept_integers,
    num_groups,
    why_not_chunks,
)
from engine.loading.quantized.scheme import Scheme
from engine.quantization.stored_integers import BookPlaces, StoredIntegers, even_groups
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import FP4, NF4

_STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
_MOST_STATE_BYTES = 1 << 16
_INVERSE_127 = 7.874015718698502e-3  # as bitsandbytes writes 1 / 127


@dataclass(frozen=True, slots=True)
class _State:
    """What a matrix's quant_state says."""

    shape: tuple[int, int]
    block_size: int
    nested_block_size: int
    nested_offset: float


def bitsandbytes_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """None of a layer of floats. ValueError for tensors that do not go together."""
    for name, kind in _STATES.items():
        if name in tensors:
            return _four_bits(tensors, name, kind)
    return _eight_bits(tensors) if "SCB" in tensors else None


def _four_bits(tensors: Headers, state_name: str, kind: str) -> MatrixHeader:
    state = _read_state(tensors, state_name)
    count = state.shape[0] * state.shape[1]
    groups = num_groups(count, state.block_size)
    octets = tensors.get("weight")
    if octets is None or octets.dtype != "U8" or math.prod(octets.shape) != -(-count // 2):
        raise ValueError(f"its weight is not the {-(-count // 2)} bytes of {state.shape[0]} x {state.shape[1]} weights")
    expect_shape(tensors, "weight.absmax", (groups,))
    expect_shape(tensors, "weight.quant_map", (16,))
    expect_dtype(tensors, "weight.quant_map", "F32")
    names = ["weight", "weight.absmax", "weight.quant_map", state_name]
    is_nested = tensors["weight.absmax"].dtype == "U8"
    if is_nested:
        expect_shape(tensors, "weight.nested_absmax", (num_groups(groups, state.nested_block_size),))
        expect_shape(tensors, "weight.nested_quant_map", (256,))
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    for name in names[1:]:
        if name not in ("weight.absmax", state_name) or (name == "weight.absmax" and not is_nested):
            expect_dtype(tensors, name, "F32")
    label = f"bitsandbytes, {kind}, groups of {state.block_size}{', nested' if is_nested else ''}"
    used = {name: tensors[name] for name in names}
    depth, fits = state.shape[1], fits_chunks(state.shape[1], state.block_size)
    why = "" if fits else why_not_chunks(depth, state.block_size)
    kept = {"nf4": NF4, "fp4": FP4}[kind] if fits else None
    return MatrixHeader(state.shape, label, kept, why, used, partial(_read_four_bits, state, label))


def _read_state(tensors: Headers, name: str) -> _State:
    """A tensor of bytes that are JSON."""
    size = math.prod(tensors[name].shape)
    if tensors[name].dtype != "U8" or size > _MOST_STATE_BYTES or len(tensors[name].shape) != 1:
        raise ValueError(f"its {name} is not the text of JSON; the file is damaged")
    try:
        fields = json.loads(bytes(tensors[name].rows(0, size).tolist()).decode())
        shape = tuple(fields["shape"])
        state = _State(
            (shape[0], shape[1]),
            fields["blocksize"],
            fields.get("nested_blocksize", 256),
            float(fields.get("nested_offset", 0.0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"its {name} does not say shape and blocksize; the file is damaged") from error
    numbers = (*state.shape, state.block_size, state.nested_block_size)
    if len(shape) != 2 or any(type(n) is not int or not 1 <= n < 1 << 40 for n in numbers):
        raise ValueError(f"its {name} says shape {shape} and blocks of {state.block_size}; the file is damaged")
    if not math.isfinite(state.nested_offset):
        raise ValueError(f"its {name} says an offset of {state.nested_offset}; the file is damaged")
    return state


def _read_four_bits(state: _State, label: str, tensors: Tensors) -> StoredLevels:
    octets, book = tensors["weight"].reshape(-1), expect_finite(tensors["weight.quant_map"], "quant_map")
    factors, depth = _factors(state, tensors), state.shape[1]

    def codes(start: int, stop: int) -> Tensor:
        first, last = start * depth, stop * depth
        some = octets[first // 2 : -(-last // 2)]
        places = torch.stack((some >> 4, some & 15), 1).flatten()[first % 2 :][: last - first]
        return places.view(-1, depth)

    return BookPlaces.of(state.shape, label, codes, book, factors, block_size=state.block_size)


def _factors(state: _State, tensors: Tensors) -> Tensor:
    """float32, of each block."""
    factors = tensors["weight.absmax"]
    if factors.dtype == torch.uint8:
        book, outer = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
        groups = torch.arange(len(factors), device="cpu") // state.nested_block_size
        factors = book[factors.int()] * outer[groups] + state.nested_offset
    return expect_finite(factors, "absmax")


def _eight_bits(tensors: Headers) -> MatrixHeader:
    num_rows, depth = expect_dimensions(tensors, "weight", 2)
    expect_dtype(tensors, "weight", "I8")
    expect_shape(tensors, "SCB", (num_rows,))
    expect_dtype(tensors, "SCB", "F32")
    label = "bitsandbytes, 8 bits, a scale for each output"
    kind, why = kept_integers(8, depth, depth, has_zeros=False)
    used = {name: tensors[name] for name in ("weight", "SCB", "weight_format") if name in tensors}
    return MatrixHeader((num_rows, depth), label, kind, why, used, partial(_read_eight_bits, label))


def _read_eight_bits(label: str, tensors: Tensors) -> StoredLevels:
    weight, scales = tensors["weight"], expect_finite(tensors["SCB"], "SCB")[:, None]
    if "weight_format" in tensors and bool(tensors["weight_format"].any()):
        raise ValueError("its 8-bit weights are in the order of an old GPU's kernels; save them again as rows")
    shape = (weight.shape[0], weight.shape[1])
    group = even_groups(shape[1], shape[1])
    stored = StoredIntegers(
        shape, None, 8, scales, 0, group, lambda i, j: weight[i:j], is_signed=True, factor=_INVERSE_127, label=label
    )
    return stored.in_smallest_format
