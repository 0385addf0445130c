"""Rows of tables in integers, as compiled code looks them up, against the whole matrix unpacked."""

from __future__ import annotations

import pytest
import torch

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    INT4_ZEROS,
    INT8,
    INT8_ZEROS,
    INTEGERS,
    NVFP4,
    Q4_K,
    Q6_K,
    QUADS,
)
from kernels.numba.ops.tables import row_address
from kernels.numba.packing.packing import pack, pack_levels, unpack
from kernels.numba.program.program import Operation, Step
from tests.support.quantised import random_levels

KINDS = [
    INT8,
    INT8_ZEROS,
    Q4_K,
    Q6_K,
    INT4_ZEROS,
    NVFP4,
    QUADS + INT4_ZEROS,
    QUADS + NVFP4,
]  # of each way to read scales


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_a_row_of_floats_is_the_one_that_was_packed(execute, op, kind: int) -> None:
    packed = pack(torch.randn(50, 96), kind)
    ids, out = torch.randint(0, 50, (19,)), torch.full((19, 96), torch.nan)
    look_up = op(Operation.GATHER_PACKED, row_address(kind), packed.values, packed.scales, out, 96, Step.INPUT_IDS)
    execute([look_up], num_rows=19, fields={Step.INPUT_IDS: ids})
    assert torch.equal(out, unpack(packed)[ids])


@pytest.mark.parametrize("kind", KINDS, ids=(INTEGERS[kind].name for kind in KINDS))
def test_a_row_is_the_one_of_the_whole_matrix(execute, op, kind: int) -> None:
    packed = pack_levels(random_levels(kind, 50, 512), kind)
    ids, out = torch.randint(0, 50, (19,)), torch.full((19, 512), torch.nan)
    look_up = op(Operation.GATHER_PACKED, row_address(kind), packed.values, packed.scales, out, 512, Step.INPUT_IDS)
    execute([look_up], num_rows=19, fields={Step.INPUT_IDS: ids})
    assert torch.equal(out, unpack(packed)[ids])
