"""Register tiles compiled for processors that need not be there: which instructions they become, and what fits."""

from __future__ import annotations

import re
from typing import NamedTuple

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from kernels.numba.core import integer_tiles, levels, paged_tiles, tiles
from kernels.numba.core.formats import INT4, INT8, INTEGERS, QUAD_INT4, QUAD_INT8
from kernels.numba.core.processor import LEVELS, Level, TileRows, level_of

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
TILES = {
    "float32": (tiles._float_tile, "float32"),
    "float16": (tiles._float_tile, "float16"),
    "bfloat16": (tiles._bfloat16_tile, "float32"),
    "rounded bfloat16": (tiles._bfloat16_tile, "bfloat16"),
    "int8": (integer_tiles._integer_tile, INTEGERS[INT8]),
    "int4": (integer_tiles._integer_tile, INTEGERS[INT4]),
    "unpacked int4": (integer_tiles._integer_tile, INTEGERS[INT4].unpacked),
    "int8 by bytes": (integer_tiles._integer_tile, INTEGERS[QUAD_INT8]),
    "int4 by bytes": (integer_tiles._integer_tile, INTEGERS[QUAD_INT4]),
    "scores": (paged_tiles._score_tile, "float16"),
    "values": (paged_tiles._value_tile, "float16"),
}


class Processor(NamedTuple):
    """A processor by LLVM's name, and those of its features that tiles ask for."""

    name: str
    features: frozenset[str]
    triple: str = "x86_64-unknown-linux-gnu"

    @property
    def level(self) -> Level:
        return level_of(self.features)


AVX2 = Processor("znver3", frozenset({"avx2", "fma", "f16c"}))
SKYLAKE = Processor("skylake-avx512", AVX2.features | AVX512)
CASCADE_LAKE = Processor("cascadelake", SKYLAKE.features | {"avx512vnni"})
ZEN4 = Processor("znver4", CASCADE_LAKE.features | {"avx512bf16"})
NEOVERSE = Processor("neoverse-v1", frozenset({"dotprod", "i8mm", "bf16"}), "aarch64-unknown-linux-gnu")
PROCESSORS = pytest.mark.parametrize(
    "processor", [AVX2, SKYLAKE, CASCADE_LAKE, ZEN4, NEOVERSE], ids=lambda processor: processor.name
)


def tallest_of(processor: Processor, tile: str) -> TileRows:
    return processor.level.integers if "int" in tile else processor.level.floats


@pytest.fixture
def assemble(monkeypatch):
    """The assembly text of a tile for a processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()

    def make(processor: Processor, tile: str | int, rows: int, panels: int) -> str:
        for module in (tiles, integer_tiles, levels):
            monkeypatch.setattr(module, "features", lambda: processor.features)
        write, element = TILES[tile] if isinstance(tile, str) else (integer_tiles._integer_tile, INTEGERS[tile])
        module = ir.Module()
        module.triple = processor.triple
        write(module, rows, panels, element).linkage = "external"
        parsed = llvm.parse_assembly(str(module))
        machine = llvm.Target.from_triple(processor.triple).create_target_machine(cpu=processor.name, opt=3)
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
        passes.getModulePassManager().run(parsed, passes)
        return machine.emit_assembly(parsed)

    return make


@PROCESSORS
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_compiles_for_every_processor(assemble, processor: Processor, tile: str) -> None:
    tallest = tallest_of(processor, tile)
    for rows, panels in ((tallest.one_panel, 1), (tallest.two_panels, 2), (1, 2), (1, 1)):
        assert "ret" in assemble(processor, tile, rows, panels)


@pytest.mark.parametrize("processor", [AVX2, ZEN4, NEOVERSE], ids=lambda processor: processor.name)
@pytest.mark.parametrize("kind", INTEGERS, ids=(one.name for one in INTEGERS.values()))
def test_every_format_of_integers_compiles_for_every_kind_of_processor(
    assemble, processor: Processor, kind: int
) -> None:
    assembly = assemble(processor, kind, 1, 2)
    if INTEGERS[kind].table and processor is not NEOVERSE:
        assert "vpshufb" in assembly  # sixteen values that lie in a register


@pytest.mark.parametrize(
    ("processor", "tile", "instruction"),
    [
        (AVX2, "float32", "vfmadd"),
        (AVX2, "int4", "vpmaddwd"),
        (SKYLAKE, "int4", "vpmaddwd"),
        (CASCADE_LAKE, "int8", "vpdpwssd"),  # of int4, LLVM's tables for this one prefer two instructions
        (CASCADE_LAKE, "rounded bfloat16", "vfmadd"),
        (ZEN4, "int4", "vpdpwssd"),
        (ZEN4, "unpacked int4", "vpdpwssd"),
        (ZEN4, "rounded bfloat16", "vdpbf16ps"),
        (AVX2, "int8 by bytes", "vpmaddwd"),
        (AVX2, "int4 by bytes", "vpmaddubsw"),
        (SKYLAKE, "int4 by bytes", "vpmaddubsw"),
        (CASCADE_LAKE, "int8 by bytes", "vpdpbusd"),
        (CASCADE_LAKE, "int4 by bytes", "vpdpbusd"),
        (ZEN4, "int8 by bytes", "vpdpbusd"),
        (ZEN4, "int4 by bytes", "vpdpbusd"),
        (NEOVERSE, "float16", "fmla"),
    ],
)
def test_a_product_is_the_processor_s_own_instruction(
    assemble, processor: Processor, tile: str, instruction: str
) -> None:
    rows = tallest_of(processor, tile).two_panels
    num_registers = {"avx2": 2}.get(processor.level.name, 1 if processor is not NEOVERSE else 4)
    assembly = assemble(processor, tile, rows, 2)
    assert len(re.findall(rf"\b{instruction}\w*", assembly)) >= rows * 2 * num_registers


@pytest.mark.parametrize("processor", [SKYLAKE, CASCADE_LAKE, ZEN4], ids=lambda processor: processor.name)
@pytest.mark.parametrize("tile", ["float32", "float16", "bfloat16", "rounded bfloat16", "scores", "values"])
def test_the_sums_of_the_tallest_tile_stay_in_registers(assemble, processor: Processor, tile: str) -> None:
    assembly = assemble(processor, tile, processor.level.floats.two_panels, 2)
    assert "%zmm" in assembly
    assert not re.findall(r"%zmm\d+, -?\d*\(%rsp\)", assembly), "stored on the stack"


@PROCESSORS
@pytest.mark.parametrize("tile", sorted(TILES.keys() - {"unpacked int4"}))  # which lies in the first cache
def test_weights_are_prefetched_past_the_first_cache(assemble, processor: Processor, tile: str) -> None:
    """What is on its way into the L1 cache holds one of a few miss buffers, which bound the rate of a core."""
    assembly = assemble(processor, tile, 1, 2)
    assert re.search(r"prefetcht1|pldl2keep", assembly)
    assert not re.search(r"prefetcht0|prefetchnta|pldl1", assembly)


def test_levels_of_x86_include_those_before_them() -> None:
    found = [processor.level.name for processor in (AVX2, SKYLAKE, CASCADE_LAKE, ZEN4)]
    assert found == list(LEVELS)
    assert level_of(ZEN4.features - {"avx512vnni"}).name == "avx512", (
        "the instructions of bfloat16 alone are not enough"
    )
    assert level_of(NEOVERSE.features).name == "generic"
