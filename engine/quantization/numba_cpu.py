"""Weight formats of the compiled CPU path: matrices in panels, packed some rows at a time by all threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from engine.config import Activations
from engine.quantization.huge_pages import HugePages
from engine.quantization.linear import ALL_ROWS, LinearMethod, LinearSpec, Part, Shards, Table
from engine.quantization.method import most_stored
from engine.quantization.stored_levels import StoredLevels
from engine.quantization.threads import Threads
from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FORMAT_OF,
    GROUP,
    IN_QUADS,
    INT4,
    INT8,
    SIZES,
    concatenate,
)
from kernels.numba.core.lanes import LANES
from kernels.numba.packing.packing import (
    PackedMatrix,
    Stack,
    fits_float16,
    pack,
    pack_exactly,
    pack_levels,
    unpack_rows,
)
from kernels.reference.moe import mix_experts

_BLOCK = 1 << 19  # elements that one thread packs at a time: what they are made of stays in its caches
_OF_16_BITS = (BFLOAT16, FLOAT16)

PackRows = Callable[[int, int], PackedMatrix | None]  # of some rows, from one to before another


@dataclass(frozen=True, slots=True)
class PackedTable(Table):
    packed: PackedMatrix

    def rows(self, ids: Tensor) -> Tensor:
        rows: Tensor = unpack_rows(self.packed, ids)
        return rows

    def describe(self) -> str:
        name: str = self.packed.format_name
        return name


class CompiledMethod(LinearMethod[Stack]):
    """What a file has in integers stays so, in the smallest size that the setting allows; of floats, 16 bits that hold
    every element, or else a format that rounds.

    wanted: that one; of_output: of the logits' matrix. Rows are packed independently of each other, so that beside the
    matrix's floats there is only what was packed so far.
    """

    has_experts = True
    wanted: ClassVar[int]
    of_output: ClassVar[int]

    def __init__(self, num_threads: int = 1, *, activations: Activations = "int16") -> None:
        """activations: that integer weights are laid out for"""
        self._threads = Threads(num_threads)
        self._memory = HugePages()
        self._in_quads = activations == "int8"

    def finish(self) -> None:
        self._threads.close()

    @torch.no_grad()
    def pack(self, shards: Shards) -> Stack:
        wanted = self.of_output if shards.spec.is_output else self.wanted
        runs = [list(run) for _, run in groupby(shards.tensors, partial(self._kept_as, wanted))]
        if any(sum(map(len, run)) % LANES for run in runs[:-1]):  # a panel would have two formats
            return Stack((self._pack_floats(shards, wanted),))
        packed = []
        for run in runs:
            part, kind = replace(shards, spec=_spec_of(run, shards.spec), tensors=run), self._kept_kind(wanted, run[0])
            packed.append(self._pack_floats(part, wanted) if kind is None else self._pack_levels(part, kind))
        return Stack(tuple(packed))

    @torch.no_grad()
    def keep_table(self, table: StoredLevels, output: object) -> PackedTable | None:
        if table.kind is None or table.order is not None:
            return None
        if isinstance(output, Stack) and [part.kind for part in output.parts] == [self._lay_out(table.kind)]:
            return PackedTable(output.parts[0])
        shards = Shards(_spec_of([table], None), torch.float32, [table])
        return PackedTable(self._pack_levels(shards, table.kind))

    def shared_table(self, table: Tensor, output: object) -> PackedTable | None:
        if not isinstance(output, Stack) or len(output.parts) != 1:
            return None
        kinds = FORMAT_OF.get(table.dtype), output.parts[0].kind  # of wider floats, 16 bits would be rounded
        return PackedTable(output.parts[0]) if all(kind in _OF_16_BITS for kind in kinds) else None

    def _kept_kind(self, wanted: int, tensor: Tensor | StoredLevels) -> int | None:
        """The format of integers that a part stays in; None where it has to be floats first."""
        if isinstance(tensor, Tensor) or tensor.kind is None or not self.keeps(tensor.kind, wanted):
            return None
        return tensor.kind

    def _kept_as(self, wanted: int, tensor: Tensor | StoredLevels) -> tuple[int | None, bytes]:
        """What parts that are packed together have in common: the format, and the order of the columns."""
        kind, order = self._kept_kind(wanted, tensor), None if isinstance(tensor, Tensor) else tensor.order
        return kind, b"" if kind is None or order is None else order.numpy().tobytes()

    def keeps(self, kind: int, wanted: int) -> bool:
        """Whether the setting allows a format of integers that a file has."""
        return bool(SIZES[kind] <= most_stored(SIZES[wanted]))

    def _pack_levels(self, shards: Shards, kind: int) -> PackedMatrix:
        kind = self._lay_out(kind)

        def pack_rows(start: int, stop: int) -> PackedMatrix:
            pieces, first = [], 0
            for tensor in shards.tensors:
                assert isinstance(tensor, StoredLevels)
                low, high = max(start - first, 0), min(stop - first, len(tensor))
                if low < high:
                    pieces.append(tensor.levels(low, high))
                first += len(tensor)
            return pack_levels(concatenate(pieces), kind)

        packed, stored = self._in_blocks(shards.spec, pack_rows), shards.tensors[0]
        assert packed is not None
        assert isinstance(stored, StoredLevels)
        return replace(packed, order=stored.order)

    def _pack_floats(self, shards: Shards, wanted: int) -> PackedMatrix:
        for kind in self._exact_formats(wanted):
            packed = self._in_blocks(shards.spec, partial(_pack_exactly, shards, kind))
            if packed is not None:
                return packed
        kind = self._lay_out(self._rounding(shards, wanted))
        packed = self._in_blocks(shards.spec, lambda start, stop: pack(shards.rows(start, stop), kind))
        assert packed is not None, "a rounding format holds any rows"
        return packed

    def _exact_formats(self, wanted: int) -> list[int]:
        """Those to try for floats, in order."""
        return [kind for kind in _OF_16_BITS if SIZES[kind] <= SIZES[wanted]]

    def _lay_out(self, kind: int) -> int:
        return IN_QUADS.get(kind, kind) if self._in_quads else kind

    def apply(self, x: Tensor, weight: Stack, bias: Tensor | None) -> Tensor:
        """Compiled programs read the matrix themselves (`engine.models.llama_numba`); this is what they compute."""
        out = x.float() @ self.dense(weight).T
        product: Tensor = (out if bias is None else out + bias).to(x.dtype)
        return product

    def mix_experts(self, x: Tensor, gate_up: Stack, down: Stack, weights: Tensor, experts: Tensor) -> Tensor:
        """As `apply`: what compiled programs compute (`engine.models.moe_numba`)."""
        num_experts = down.num_rows // x.shape[1]
        wide, narrow = (one.dense(0, one.num_rows).view(num_experts, -1, one.depth) for one in (gate_up, down))
        return mix_experts(x.float(), wide, narrow, weights, experts).to(x.dtype)

    def dense(self, weight: Stack, rows: slice = ALL_ROWS) -> Tensor:
        start, stop, _ = rows.indices(weight.num_rows)
        dense: Tensor = weight.dense(start, stop)
        return dense

    def describe(self, weight: Stack) -> str:
        name: str = weight.format_name
        return name

    def _rounding(self, shards: Shards, wanted: int) -> int:
        """The format to round to."""
        wide: int = FLOAT32
        if wanted == wide:
            return wide
        fits = self._threads.map(lambda rows: fits_float16(shards.rows(*rows)), self._blocks(shards.spec))
        if not all(fits):  # nor would the scales and offsets of the integer formats
            return wide
        half: int = FLOAT16
        return half if shards.spec.num_inputs % GROUP else wanted

    def _in_blocks(self, spec: LinearSpec, pack_rows: PackRows) -> PackedMatrix | None:
        """The whole matrix, some rows at a time; None where `pack_rows` returns None for any of them."""
        num_rows, depth = spec.shape
        panel = pack_rows(0, min(LANES, num_rows))
        if panel is None:
            return None
        num_panels = -(-num_rows // LANES)
        values = self._memory.empty((num_panels, *panel.values.shape[1:]), panel.values.dtype)
        scales = panel.scales.new_empty((num_panels, *panel.scales.shape[1:])) if panel.scales.numel() else panel.scales
        fails = False

        def fill(rows: tuple[int, int]) -> None:
            nonlocal fails
            packed = None if fails else pack_rows(*rows)
            if packed is None:
                fails = True
                return
            first = rows[0] // LANES
            values[first : first + packed.num_panels] = packed.values
            if scales.numel():
                scales[first : first + packed.num_panels] = packed.scales

        self._threads.map(fill, self._blocks(spec))
        if fails:
            self._memory.give_back(values)
            return None
        return PackedMatrix(panel.kind, num_rows, depth, values, scales)

    def _blocks(self, spec: LinearSpec) -> list[tuple[int, int]]:
        """(first row, last + 1), of whole panels; as many for each thread."""
        num_rows, depth = spec.shape
        step = self._threads.step(-(-num_rows // LANES), max(1, _BLOCK // (depth * LANES))) * LANES
        return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _spec_of(run: list[Tensor | StoredLevels], spec: LinearSpec | None) -> LinearSpec:
    """Of some parts of a matrix."""
    return LinearSpec(run[0].shape[1], (Part("", sum(map(len, run))),), is_output=spec is not None and spec.is_output)


def _pack_exactly(shards: Shards, kind: int, start: int, stop: int) -> PackedMatrix | None:
    return pack_exactly(shards.rows(start, stop), kind)


class ExactMethod(CompiledMethod):
    """bfloat16, float16 or float32, whichever holds every weight: `model.quantization: none`."""

    wanted = of_output = FLOAT32

    def keeps(self, kind: int, wanted: int) -> bool:
        return False


class HalfMethod(CompiledMethod):
    """float16, or what is smaller and exact."""

    wanted = of_output = FLOAT16


class Int8Method(CompiledMethod):
    """int8 with a scale for each 32 weights, or what a file has in no more bits."""

    wanted = of_output = INT8


class Int4Method(CompiledMethod):
    """int4 with a scale and an offset for each 32 weights, or what a file has in no more bits. Logits keep eight."""

    wanted, of_output = INT4, INT8
