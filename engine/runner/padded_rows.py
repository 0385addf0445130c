"""Products of a CPU's torch layers whose rows do not depend on each other: those of few rows are filled up.

oneDNN sums a bfloat16 product of a single row in another order than one of two rows or more. From two on, a row has
the same bits in every product. No library promises that, so it is tried here, once for every shape, and shorter
products are padded. A row of logits then depends on its own tokens alone, as long as attention does
(`engine.attention.numba_backend`), and a seed means the same tokens in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.model import Model
from engine.models.moe import Experts, Gate
from engine.quantization.linear import KeptMatrix, Linear, Shards
from engine.quantization.method import PackedMethod
from kernels.reference.moe import mix_experts

_FREE_ROWS = 2  # the weights are read once either way
_MOST_ROWS = 16  # that strict determinism may take
_NUM_CORRECTIONS = 4  # each leaves a 256th of what was left, in bfloat16
_NUM_PLACES = 4  # in which each number of rows is tried, if there are so many
# Rows: all that padding may leave, and beyond them some of every stretch in which AMX has been seen to sum in another
# order (float32 up to 15 rows; bfloat16 33 to 63, up to 36, from 37 on)
_TRIED = (*range(1, 18), 24, 31, 32, 33, 36, 37, 48, 63, 64, 65, 96, 130)
_LARGE_MATRIX = 1 << 26  # elements: an output layer's, which seldom has many rows and takes seconds to try
_PRODUCTS = (nn.Linear, Linear, Gate)

Product = Callable[[Tensor], Tensor]


class PaddedRows(nn.Module):
    """A product that computes row by row, called with at least so many rows."""

    def __init__(self, module: nn.Module, num_rows: int) -> None:
        super().__init__()
        self.module, self.num_rows = module, num_rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., num_tokens, num_inputs] -> [..., num_tokens, num_outputs]"""
        num_tokens = x.shape[-2]
        missing = self.num_rows - num_tokens
        product: Tensor = self.module(x if missing <= 0 else F.pad(x, (0, 0, 0, missing)))
        return product if missing <= 0 else product[..., :num_tokens, :]


@torch.inference_mode()
def make_rows_independent(model: Model, *, is_strict: bool) -> bool:
    """Pads the model's products, in place, if that makes their rows independent; else leaves them unpadded.

    is_strict: also where it takes more rows than are free. Call it when the weights are packed.
    """
    if not _has_known_products_only(model):
        return False
    _pack_gates(model)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    num_rows = max(_least_rows(product, weight, dtype) for product, weight in _one_of_each_shape(model))
    if num_rows > (_MOST_ROWS if is_strict else _FREE_ROWS):
        return False
    if num_rows > 1:
        _pad(model, num_rows)
    return True


def _pack_gates(model: Model) -> None:
    """Gates have few outputs, and torch multiplies by such matrices in ways of their own up to 64 rows."""
    packed = PackedMethod()
    for parent, name, child in _children(model):
        if isinstance(child, Gate):
            shards = Shards.of(child.weight.detach())
            if packed.accepts(shards.spec, shards.dtype, child.weight.device):
                setattr(parent, name, Linear.holding(packed.pack(shards), shards.spec, packed, None))


def _has_known_products_only(model: Model) -> bool:
    """Whether every matrix belongs to a module whose products are known here, or is a table to look things up in."""
    known = (*_PRODUCTS, nn.Embedding, KeptMatrix)
    return all(
        isinstance(module, known) or parameter.dim() < 2
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _one_of_each_shape(model: Model) -> Iterator[tuple[Product, Tensor]]:
    """(product, its matrix as [outputs, inputs])"""
    seen: set[tuple[object, ...]] = set()
    for module in model.modules():
        for product, shape, matrix in _products_of(module):
            key = (type(module), *shape)
            if key not in seen:
                seen.add(key)
                yield product, matrix()


def _products_of(module: nn.Module) -> list[tuple[Product, tuple[int, ...], Callable[[], Tensor]]]:
    """(product, the shape of its matrix, that matrix, which may have to be unpacked)"""
    if isinstance(module, Linear):
        return [(module, module.spec.shape, module.dense)]
    if isinstance(module, nn.Linear | Gate):
        return [(module, tuple(module.weight.shape), lambda: module.weight)]
    if isinstance(module, Experts):
        return [_expert_product(matrices[0]) for matrices in module.stacks]
    return []


def _expert_product(weight: Tensor) -> tuple[Product, tuple[int, ...], Callable[[], Tensor]]:
    return functools.partial(F.linear, weight=weight), tuple(weight.shape), lambda: weight


def _least_rows(product: Product, weight: Tensor, dtype: torch.dtype) -> int:
    """Number of rows from which on a row has the same bits in every product, whatever its place; else beyond all."""
    x = _cancelling_rows(weight, max(_TRIED) + 1).to(dtype)
    whole = product(x)
    least = 1
    tried = _TRIED if weight.numel() <= _LARGE_MATRIX else _TRIED[: _TRIED.index(17)]
    for num_rows in tried:
        starts = range(0, len(x) - num_rows + 1, max(num_rows, len(x) // _NUM_PLACES))
        if not all(torch.equal(product(x[i : i + num_rows]), whole[i : i + num_rows]) for i in starts):
            least = num_rows + 1
    return least


def _cancelling_rows(weight: Tensor, num_rows: int) -> Tensor:
    """Inputs, [num_rows, inputs], each of which makes one output a sum whose terms cancel out.

    What is left is what summation rounded, so that another order shows. In usual sums it shows in one bfloat16 of
    thirty thousand, and a few rows would prove nothing.
    """
    num_outputs, num_inputs = weight.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_inputs, generator=generator).to(weight.dtype).double()
    columns = torch.randint(num_inputs, (num_rows, _NUM_CORRECTIONS), generator=generator)
    rows = torch.arange(num_rows)
    matrix = weight[rows % num_outputs].double()
    x[rows[:, None], columns] = 0
    for column in columns.T:
        left, factor = (x * matrix).sum(1), matrix[rows, column]
        correction = torch.where(factor != 0, -left / factor, 0).to(weight.dtype).double()
        x[rows, column] += correction.nan_to_num(0, 0, 0).clamp(-1e4, 1e4)
    return x


def _pad(model: Model, num_rows: int) -> None:
    for parent, name, child in _children(model):
        if isinstance(child, _PRODUCTS):
            setattr(parent, name, PaddedRows(child, num_rows))
    model.operations = replace(model.operations, mix_experts=functools.partial(mix_experts, min_rows=num_rows))


def _children(model: Model) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child), before any is exchanged"""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
