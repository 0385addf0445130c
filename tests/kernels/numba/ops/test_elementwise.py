"""What lies between two products, against the torch definitions in float64, with the bounds that each has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from kernels.numba.core.formats import DTYPES, FLOAT16, GROUP
from kernels.numba.core.lanes import LANES, exponentiate
from kernels.numba.program.program import Operation, Step
from kernels.reference.activation import silu_and_mul
from kernels.reference.attention import store_kv
from kernels.reference.norm import rms_norm
from kernels.reference.qkv import normalise_and_rotate
from kernels.reference.rope import rope_factors

ROWS = (1, 7, 8, 9, 33)  # units are of eight rows
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the element


@njit("float32(int64, int64, float32)")
def soften(scores, count, largest):
    return exponentiate(scores, count, largest)


def exponentials(x: Tensor, largest: float = 0.0) -> tuple[Tensor, float]:
    """e^(x - largest) of any number of elements, and their sum."""
    padded = torch.cat((x, torch.full((-len(x) % LANES,), -torch.inf)))
    total = soften(padded.data_ptr(), len(padded) // LANES, np.float32(largest))
    return padded[: len(x)], float(total)


def test_an_exponential_is_within_two_units_in_the_last_place() -> None:
    x = torch.cat((torch.linspace(-87.3, 88.0, 200_000), torch.randn(10_000), torch.tensor([0.0, -0.0])))
    values, _ = exponentials(x)
    expected = x.double().exp()
    assert ((values.double() - expected).abs() <= 2 * 2.0**-23 * expected).all()
    assert values[-1] == values[-2] == 1.0


def test_exponentials_at_the_ends_of_the_range() -> None:
    x = torch.tensor([torch.nan, -torch.inf, -1e30, -2e9, -1000.0, -88.0, 89.0, torch.inf])
    values, _ = exponentials(x)
    assert values[0].isnan()
    assert values[1:4].tolist() == [0.0, 0.0, 0.0]
    assert (values[4:6] == exponentials(torch.tensor([-87.3]))[0]).all()  # not zero, but nothing beside a score of 0
    assert values[4:6].max() < 1.3e-38
    assert (values[6:] == exponentials(torch.tensor([88.0]))[0]).all()


def test_scores_are_taken_relative_to_the_largest() -> None:
    x = 300 + 10 * torch.randn(5 * LANES)
    values, total = exponentials(x.clone(), float(x.max()))
    expected = (x.double() - x.max()).exp()
    torch.testing.assert_close(values.double(), expected, rtol=2**-20, atol=0)
    assert values.max() == 1.0
    assert math.isclose(total, float(expected.sum()), rel_tol=1e-6)


def rounded(execute, op, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scales, scale times sum of the integers) by group"""
    groups = x.shape[1] // GROUP
    integers, factors = torch.empty(x.shape, dtype=torch.int16), torch.full((x.shape[0], groups, 4), torch.nan)
    execute([op(Operation.QUANTISE, x, integers, factors, x.shape[1])], num_rows=x.shape[0])
    integers = integers.view(x.shape[0], groups, GROUP)
    if x.isfinite().all():
        halves = integers.int().view(x.shape[0], groups, 2, -1).sum(-1)
        assert torch.equal(factors.view(torch.int32)[..., 2:].long(), halves)
    return integers, factors[..., 0], factors[..., 1]


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e30])
def test_rounding_is_within_half_a_step_of_its_group(execute, op, scale: float) -> None:
    for num_rows in ROWS:
        x = scale * torch.randn(num_rows, 5 * GROUP) * torch.logspace(-3, 3, 5).repeat_interleave(GROUP)
        integers, scales, sums = rounded(execute, op, x)
        groups = x.double().view(integers.shape)
        largest = groups.abs().amax(-1, keepdim=True)
        error = (integers.double() * scales.double().unsqueeze(-1) - groups).abs()
        # 2^-16 for the nearest integer; rounding the scale and its inverse to float32 adds a 2^-7th of that
        assert (error <= 2**-16 * (1 + 2**-7) * largest).all()
        assert (integers.abs().amax(-1) == 32767).all()
        exact = scales.double() * integers.double().sum(-1)
        torch.testing.assert_close(sums.double(), exact, rtol=2**-22, atol=0)


def rounded_to_bytes(execute, op, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 [rows, groups, 32], and of each group the scale, minus what stands for zero, and the scaled sum."""
    groups = x.shape[1] // GROUP
    integers, factors = torch.empty(x.shape, dtype=torch.uint8), torch.full((x.shape[0], groups, 4), torch.nan)
    execute([op(Operation.QUANTISE_TO_BYTES, x, integers, factors, x.shape[1])], num_rows=x.shape[0])
    integers = integers.view(x.shape[0], groups, GROUP)
    if x.isfinite().all():
        halves = (integers.int() + factors[..., 1:2].int()).view(x.shape[0], groups, 2, -1).sum(-1)
        assert torch.equal(factors[..., 3:].contiguous().view(torch.int16).long(), halves)
    return integers, *factors[..., :3].unbind(-1)


@pytest.mark.parametrize("offset", [0.0, -0.5, 3.0, -100.0])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e30])
def test_rounding_to_bytes_is_within_half_a_step_of_the_group_s_span(execute, op, scale: float, offset: float) -> None:
    for num_rows in ROWS:
        x = (torch.randn(num_rows, 5 * GROUP) + offset) * scale
        x = x * torch.logspace(-3, 3, 5).repeat_interleave(GROUP)
        integers, scales, zeros, sums = rounded_to_bytes(execute, op, x)
        groups = x.double().view(integers.shape)
        low, high = (extreme.unsqueeze(-1) for extreme in groups.aminmax(dim=-1))
        span = high.clamp(min=0) - low.clamp(max=0)
        shifted = integers.double() + zeros.double().unsqueeze(-1)
        error = (shifted * scales.double().unsqueeze(-1) - groups).abs()
        assert (error <= span / 508 * (1 + 2**-12)).all()
        assert (zeros == zeros.round()).all()
        assert ((zeros >= -255) & (zeros <= 0)).all()
        torch.testing.assert_close(sums.double(), scales.double() * shifted.sum(-1), rtol=2**-22, atol=0)


def test_what_is_no_number_stays_none(execute, op) -> None:
    for outlier in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 3 * GROUP)
        x[1, GROUP + 7] = outlier
        for round_rows in (rounded, rounded_to_bytes):
            _, scales, *_ = round_rows(execute, op, x)
            assert scales.isfinite().tolist() == [[True] * 3, [True, False, True]]


def test_a_group_of_zeros_stays_zeros(execute, op) -> None:
    x = torch.zeros(3, 2 * GROUP)
    x[1, GROUP:] = torch.randn(GROUP)
    x[2] = 1e-38  # too small to divide by
    for factor in rounded_to_bytes(execute, op, x):
        assert (factor[[0, 1], [0, 0]] == 0).all()
    integers, scales, sums = rounded(execute, op, x)
    assert (integers[[0, 1, 2, 2], [0, 0, 0, 1]] == 0).all()
    assert (sums[[0, 1, 2, 2], [0, 0, 0, 1]] == 0).all()
    assert (scales[0] == 0).all()
    assert integers[1, 1].any()


@pytest.mark.parametrize("size", [16, 48, 576])
def test_norms_are_the_definition(execute, op, size: int) -> None:
    for num_rows in ROWS:
        x, weight, out = 3 * torch.randn(num_rows, size), torch.randn(size), torch.full((num_rows, size), torch.nan)
        execute([op(Operation.NORMALISE, x, weight, out, size, factors=(1e-5, 0.0))], num_rows=num_rows)
        expected = rms_norm(x.double(), weight.double(), 1e-5)
        torch.testing.assert_close(out.double(), expected, rtol=2**-20, atol=0)  # a dozen roundings of 2^-24


def test_norms_of_extremes(execute, op) -> None:
    x, weight = torch.zeros(4, 32), torch.ones(32)
    x[1, 3], x[2], x[3] = torch.nan, 1e-12, 1e15
    out = torch.empty_like(x)
    execute([op(Operation.NORMALISE, x, weight, out, 32, factors=(1e-6, 0.0))], num_rows=4)
    assert (out[0] == 0).all()
    assert out[1].isnan().all()
    torch.testing.assert_close(out[2], torch.full((32,), 1e-9), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[3], torch.ones(32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [16, 48, 1536])
def test_gated_activations_are_the_definition(execute, op, size: int) -> None:
    for num_rows in ROWS:
        x, out = 4 * torch.randn(num_rows, 2 * size), torch.full((num_rows, size), torch.nan)
        x[0, :size] = torch.linspace(-87, 88, size)
        execute([op(Operation.SILU_AND_MULTIPLY, x, out, size)], num_rows=num_rows)
        # two units of the exponential, and a sum, a quotient and a product: below 2^-20
        torch.testing.assert_close(out.double(), silu_and_mul(x.double()), rtol=2**-20, atol=0)


def test_gates_beyond_the_exponential_are_open_or_shut(execute, op) -> None:
    x, out = torch.ones(1, 32), torch.empty(1, 16)
    x[0, :5] = torch.tensor([-200.0, -1e9, 200.0, 1e30, torch.nan])
    execute([op(Operation.SILU_AND_MULTIPLY, x, out, 16)], num_rows=1)
    assert out[0, :2].abs().max() < 1e-28
    assert out[0, 2:4].tolist() == x[0, 2:4].tolist()
    assert out[0, 4].isnan()
    assert out[0, 5:].isfinite().all()


NUM_POSITIONS = 30  # that the tables of rotations have


class Heads:
    """A merged projection, and a cache with its keys as columns, that holds NaN where nothing was stored."""

    def __init__(self, kind: int, *, num_heads: int, num_kv_heads: int, size: int, num_rows: int) -> None:
        self.kind, self.num_heads, self.num_kv_heads, self.size = kind, num_heads, num_kv_heads, size
        self.qkv = 2 * torch.randn(num_rows, num_heads + 2 * num_kv_heads, size)
        self.blocks, self.block = 5, 16
        self.cache = torch.full((self.blocks, num_kv_heads, 2, self.block * size), torch.nan, dtype=DTYPES[kind])
        self.slots = torch.randperm(self.blocks * self.block)[:num_rows]
        self.positions = torch.randint(NUM_POSITIONS, (num_rows,))
        self.norms = [torch.randn(size), torch.randn(size)]

    def store(self, execute, op, *, has_norms: bool, cos: Tensor, sin: Tensor) -> None:
        norms = self.norms if has_norms else (0, 0)
        shape = (self.num_heads, self.num_kv_heads, self.size)
        rotation = (0, cos.shape[1]) if cos.numel() else (0, 0)
        keys, values = self.cache.unbind(2)
        where = (keys, values, self.kind, self.block, *(x * keys.itemsize for x in keys.stride()[:2]))
        store = op(Operation.ROTATE_AND_STORE, self.qkv, *shape, *norms, *rotation, *where, factors=(1e-6, 0.0))
        # sin follows cos in the step, as the addresses of further rotations do
        rotation = {Step.ROTATIONS: cos, Step.ROTATIONS + 1: sin}
        fields = {**rotation, Step.SLOTS: self.slots, Step.POSITIONS: self.positions}
        execute([store], num_rows=self.qkv.shape[0], fields=fields)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [blocks, heads, block, size]."""
        keys, values = self.cache.double().unbind(2)
        return keys.unflatten(2, (self.size, self.block)).transpose(2, 3), values.unflatten(2, (self.block, self.size))


def assert_stored(stored: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Half a step of the cache's format, and the roundings of norm and rotation: 2^-20 of the largest element."""
    assert torch.equal(stored.isnan(), expected.isnan())
    kept = expected.nan_to_num()
    bound = HALF_STEP[dtype] * kept.abs() + 2**-20 * kept.abs().amax()
    assert ((stored.nan_to_num() - kept).abs() <= bound).all()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("width", [0, 8, 16, 48])
def test_heads_are_normalised_rotated_and_stored(execute, op, width: int, has_norms: bool, kind: int) -> None:
    for num_rows, num_heads, num_kv_heads in ((1, 4, 2), (9, 3, 3), (20, 5, 1)):
        heads = Heads(kind, num_heads=num_heads, num_kv_heads=num_kv_heads, size=48, num_rows=num_rows)
        cos, sin = rope_factors(10 * torch.randn(NUM_POSITIONS, width // 2))
        q, k, v = heads.qkv.double().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        weights = {f"{name}_weight": norm.double() for name, norm in zip("qk", heads.norms, strict=True)}
        rotation = (cos[heads.positions].double(), sin[heads.positions].double()) if width else (None, None)
        q, k = normalise_and_rotate(q, k, *rotation, **(weights if has_norms else {}), eps=1e-6)
        expected = torch.full((2, heads.blocks, num_kv_heads, heads.block, 48), torch.nan, dtype=torch.float64)
        store_kv(k, v, *expected, heads.slots)
        heads.store(execute, op, has_norms=has_norms, cos=cos, sin=sin)
        assert_stored(heads.qkv[:, :num_heads].double(), q, torch.float32)
        for stored, wanted in zip(heads.stored(), expected, strict=True):
            assert_stored(stored, wanted, DTYPES[kind])


def test_a_float16_cache_holds_the_largest_it_can_instead_of_infinity(execute, op) -> None:
    heads = Heads(FLOAT16, num_heads=1, num_kv_heads=1, size=16, num_rows=1)
    heads.qkv[0, 1:, :4] = torch.tensor([1e5, -1e9, torch.nan, 65519.0])
    heads.store(execute, op, has_norms=False, cos=torch.empty(0), sin=torch.empty(0))
    for stored in heads.stored():
        row = stored[:, 0].flatten(0, 1)[heads.slots[0]]
        assert row[[0, 1, 3]].tolist() == [65504.0, -65504.0, 65504.0]
        assert row[2].isnan()


@pytest.mark.parametrize("kind", DTYPES)
def test_embeddings_are_gathered_as_they_are(execute, op, kind: int) -> None:
    table = (torch.randn(50, 48) * torch.logspace(-12, 3, 48)).to(DTYPES[kind])
    table[3, :3] = torch.tensor([torch.inf, -0.0, torch.nan])
    for num_rows in ROWS:
        ids, out = torch.randint(50, (num_rows,)), torch.empty(num_rows, 48)
        ids[-1] = 3
        gather = op(Operation.GATHER, table, kind, out, 48, Step.INPUT_IDS)
        execute([gather], num_rows=num_rows, fields={Step.INPUT_IDS: ids})
        torch.testing.assert_close(out, table[ids].float(), rtol=0, atol=0, equal_nan=True)


def test_a_bias_is_written_or_added_to_every_row(execute, op) -> None:
    for num_rows in ROWS:
        bias, before = torch.randn(48), torch.randn(num_rows, 48)
        written, added = before.clone(), before.clone()
        operations = [op(Operation.FILL, bias, written, 48, 0), op(Operation.FILL, bias, added, 48, 1)]
        execute(operations, num_rows=num_rows)
        assert torch.equal(written, bias.expand(num_rows, 48))
        assert torch.equal(added, before + bias)


def test_columns_are_put_into_an_order(execute, op) -> None:
    for num_rows in ROWS:
        x, out, order = torch.randn(num_rows, 48), torch.full((num_rows, 48), torch.nan), torch.randperm(48)
        execute([op(Operation.PERMUTE, x, order, out, 48)], num_rows=num_rows)
        assert torch.equal(out, x[:, order])
