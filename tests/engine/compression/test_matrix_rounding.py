"""Matrices become the nearest integers, in the layout that the loader reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.compression.matrix_rounding import RoundingError, round_matrix, rounded_floats
from engine.compression.quantization_config import quantization_config
from engine.compression.weight_scheme import WeightScheme
from engine.loading.quantized.checkpoint import read_quantized
from engine.loading.quantized.scheme import Scheme
from engine.loading.stored_weights import StoredTensor, read_stored_weights
from engine.quantization.bit_packing import pack_bits, unpack_bits
from engine.quantization.linear import Shards
from engine.quantization.stored_levels import StoredLevels
from engine.quantization.triton_gpu import Int4Method, Int8Method, RoundingMethod
from kernels.reference.quantized import quantize_rows
from tests import ROOT

SCHEMES = [
    WeightScheme(bits, group_size, is_symmetric)
    for bits in range(2, 9)
    for group_size in (32, 128, None)
    for is_symmetric in (True, False)
]
IDS = [scheme.label for scheme in SCHEMES]


def weights(rows: int = 48, depth: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, depth, generator=generator) * torch.rand(rows, 1, generator=generator)


def read_back(tensors: dict[str, Tensor], scheme: WeightScheme, path: Path) -> Tensor:
    """As the loader reads it from a file."""
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    stored: dict[str, StoredTensor] = read_stored_weights((path / "model.safetensors",))
    quantized = read_quantized(stored, Scheme("compressed-tensors", quantization_config({"layer": scheme}, [])))
    header = quantized.matrices["layer.weight"]
    matrix: StoredLevels = header.read({name: tensors[name] for name in header.tensors})
    return matrix.dense(0, header.shape[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_matrix_comes_back_as_it_was_rounded(scheme: WeightScheme, tmp_path: Path) -> None:
    weight = weights()
    tensors = round_matrix(weight, scheme, scales="BF16")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (_, shape) in scheme.tensors((48, 256), "BF16").items()
    }
    assert torch.equal(read_back(tensors, scheme, tmp_path), rounded_floats(weight, scheme, scales="BF16"))


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        (Int8Method(), WeightScheme(8, 128)),
        (Int4Method(), WeightScheme(4, 32, is_symmetric=False)),
    ],
    ids=["int8", "int4"],
)
def test_values_are_those_that_a_gpu_keeps_while_it_loads(method: RoundingMethod, scheme: WeightScheme) -> None:
    """`--quantization int8` and `int4`, in Triton's layers."""
    weight = weights()
    kept = method.pack(Shards.of(weight))
    assert kept is not None
    assert torch.equal(method.dense(kept).float(), rounded_floats(weight, scheme, scales="BF16"))


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one.bits in (2, 4, 8)], ids=lambda one: one.label)
def test_the_least_squared_error_is_no_more_than_that_of_the_whole_range(scheme: WeightScheme) -> None:
    weight = weights()
    errors = []
    for observer in ("minmax", "mse"):
        found = rounded_floats(
            weight, WeightScheme(scheme.bits, scheme.group_size, scheme.is_symmetric, observer=observer), scales="F32"
        )
        size = scheme.group_size or weight.shape[1]
        errors.append((found - weight).square().view(48, -1, size).sum(2))
    assert bool((errors[1] <= errors[0] * (1 + 1e-3)).all())
    if scheme.bits < 8:
        assert errors[1].sum() < errors[0].sum()


def test_floats_of_8_bits_are_those_of_a_scale_for_each_row(tmp_path: Path) -> None:
    weight = weights()
    scheme = WeightScheme(8, is_float=True)
    tensors = round_matrix(weight, scheme, scales="F32")
    values, scales = quantize_rows(weight, torch.float8_e4m3fn)
    assert torch.equal(tensors["weight"].float(), values.float())
    assert torch.equal(read_back(tensors, scheme, tmp_path), values.float() * scales[:, None])


def test_errors_add_up_to_their_root_mean_square() -> None:
    weight, error, scheme = weights(), RoundingError(), WeightScheme(3, 32)
    round_matrix(weight, scheme, scales="BF16", error=error)
    changed = (rounded_floats(weight, scheme, scales="BF16") - weight).square().sum()
    assert error.relative == pytest.approx(float((changed / weight.square().sum()).sqrt()), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_no_numbers_is_refused(value: float) -> None:
    weight = weights()
    weight[47, 3] = value
    with pytest.raises(ValueError, match="infinite or no numbers"):
        round_matrix(weight, WeightScheme(4, 32), scales="BF16")


def test_groups_of_zeros_stay_zero() -> None:
    for scheme in SCHEMES:
        assert not rounded_floats(torch.zeros(32, 128), scheme, scales="F16").any()


ORACLE = ROOT / "tests/engine/loading/quantized/oracles/compressed-tensors.safetensors"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("has_zeros", [False, True])
def test_words_are_those_of_the_library(bits: int, has_zeros: bool) -> None:
    """Which it made of weights in bfloat16, with scales and zero points that it was given."""
    case = f"packed {bits}{', zero points' if has_zeros else ''}"
    with safe_open(ORACLE, "pt") as opened:
        found = {name: opened.get_tensor(f"{case}/{name}") for name in ("weight_packed", "weight_scale", "dense")}
        zeros = opened.get_tensor(f"{case}/weight_zero_point") if has_zeros else None
    scales, dense = found["weight_scale"].float(), found["dense"]
    rows, depth = dense.shape
    middle = torch.full(scales.shape, 1 << (bits - 1))
    zero = middle if zeros is None else unpack_bits(zeros.T.contiguous(), bits, rows).T.contiguous().int()
    spread = depth // scales.shape[1]
    levels = (dense.float() / scales.repeat_interleave(spread, 1)).round() + zero.repeat_interleave(spread, 1)
    assert torch.equal(pack_bits(levels.to(torch.uint8), bits), found["weight_packed"])
    if zeros is not None:
        assert torch.equal(pack_bits(zero.to(torch.uint8).T.contiguous(), bits).T, zeros)
