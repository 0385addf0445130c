"""Weight formats of the compiled CPU path: matrices in panels, packed some rows at a time by all threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from engine.config import Activations
from engine.quantization.huge_pages import HugePages
from engine.quantization.linear import ALL_ROWS, LinearMethod, Shards
from engine.quantization.threads import Threads
from kernels.numba.core.formats import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, SIZES
from kernels.numba.core.lanes import GROUP, LANES
from kernels.numba.packing.packing import (
    SMALLEST_FIRST,
    PackedMatrix,
    fits_float16,
    in_quads,
    pack,
    pack_exactly,
    unpack,
)

_BLOCK = 1 << 19  # elements that one thread packs at a time: what they are made of stays in its caches

PackRows = Callable[[Tensor], PackedMatrix | None]


class CompiledMethod(LinearMethod[PackedMatrix]):
    """The smallest format that the setting allows and that holds every element, or else one that rounds.

    wanted: that one; of_output: of the logits' matrix. Rows are packed independently of each other, so that beside the
    matrix's floats there is only what was packed so far.
    """

    wanted: ClassVar[int]
    of_output: ClassVar[int]

    def __init__(self, num_threads: int = 1, *, activations: Activations = "int16") -> None:
        """activations: that integer weights are laid out for"""
        self._threads = Threads(num_threads)
        self._memory = HugePages()
        self._lay_out: Callable[[PackedMatrix], PackedMatrix] = (
            in_quads if activations == "int8" else lambda packed: packed
        )

    def finish(self) -> None:
        self._threads.close()

    @torch.no_grad()
    def pack(self, shards: Shards) -> PackedMatrix:
        wanted = self.of_output if shards.spec.is_output else self.wanted
        for kind in self.exact_formats(wanted):
            packed = self._in_blocks(shards, partial(self._pack_exactly, kind))
            if packed is not None:
                return packed
        rounding = self._rounding(shards, wanted)
        packed = self._in_blocks(shards, lambda rows: self._lay_out(pack(rows, rounding)))
        assert packed is not None, "a rounding format holds any rows"
        return packed

    def _pack_exactly(self, kind: int, rows: Tensor) -> PackedMatrix | None:
        packed = pack_exactly(rows, among=(kind,))
        return None if packed is None else self._lay_out(packed)

    def exact_formats(self, wanted: int) -> list[int]:
        """Those to try, in order. What 16 bits hold is not looked at for levels, which it could have by chance."""
        allowed = [kind for kind in SMALLEST_FIRST if SIZES[kind] <= SIZES[wanted]]
        return sorted(allowed, key=lambda kind: kind != BFLOAT16)

    def apply(self, x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
        """Compiled programs read the matrix themselves (`engine.models.llama_numba`); this is what they compute."""
        out = x.float() @ unpack(weight).T
        product: Tensor = (out if bias is None else out + bias).to(x.dtype)
        return product

    def dense(self, weight: PackedMatrix, rows: slice = ALL_ROWS) -> Tensor:
        start, stop, _ = rows.indices(weight.num_rows)
        first, last = start // LANES, -(-stop // LANES)
        scales = weight.scales[first:last] if weight.scales.numel() else weight.scales
        some = replace(weight, num_rows=stop - first * LANES, values=weight.values[first:last], scales=scales)
        dense: Tensor = unpack(some)[start - first * LANES :]
        return dense

    def describe(self, weight: PackedMatrix) -> str:
        name: str = weight.format_name
        return name

    def _rounding(self, shards: Shards, wanted: int) -> int:
        """The format to round to."""
        wide: int = FLOAT32
        if wanted == wide:
            return wide
        fits = self._threads.map(lambda rows: fits_float16(shards.rows(*rows)), self._blocks(shards))
        if not all(fits):  # nor would the scales and offsets of the integer formats
            return wide
        half: int = FLOAT16
        return half if shards.spec.num_inputs % GROUP else wanted

    def _in_blocks(self, shards: Shards, pack_rows: PackRows) -> PackedMatrix | None:
        """The whole matrix, some rows at a time; None where `pack_rows` returns None for any of them."""
        num_rows, depth = shards.spec.shape
        panel = pack_rows(shards.rows(0, min(LANES, num_rows)))
        if panel is None:
            return None
        num_panels = -(-num_rows // LANES)
        values = self._memory.empty((num_panels, *panel.values.shape[1:]), panel.values.dtype)
        scales = panel.scales.new_empty((num_panels, *panel.scales.shape[1:])) if panel.scales.numel() else panel.scales
        fails = False

        def fill(rows: tuple[int, int]) -> None:
            nonlocal fails
            packed = None if fails else pack_rows(shards.rows(*rows))
            if packed is None:
                fails = True
                return
            first = rows[0] // LANES
            values[first : first + packed.num_panels] = packed.values
            if scales.numel():
                scales[first : first + packed.num_panels] = packed.scales

        self._threads.map(fill, self._blocks(shards))
        if fails:
            self._memory.give_back(values)
            return None
        return PackedMatrix(panel.kind, num_rows, depth, values, scales)

    def _blocks(self, shards: Shards) -> list[tuple[int, int]]:
        """(first row, last + 1), of whole panels; as many for each thread."""
        num_rows, depth = shards.spec.shape
        step = self._threads.step(-(-num_rows // LANES), max(1, _BLOCK // (depth * LANES))) * LANES
        return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class ExactMethod(CompiledMethod):
    """bfloat16, float16 or float32, whichever holds every weight: `model.quantization: none`."""

    wanted = of_output = FLOAT32

    def exact_formats(self, wanted: int) -> list[int]:
        return [BFLOAT16, FLOAT16]


class HalfMethod(CompiledMethod):
    """float16, or what is smaller and exact."""

    wanted = of_output = FLOAT16


class Int8Method(CompiledMethod):
    """int8 with a scale for each 32 weights, or an exact int4."""

    wanted = of_output = INT8


class Int4Method(CompiledMethod):
    """int4 with a scale and an offset for each 32 weights. Logits keep eight bits."""

    wanted, of_output = INT4, INT8
