"""`device.determinism: strict` on a GPU: matrix products that always have the same number of rows.

A library chooses by the number of rows how to cut and sum a product, and a row's last bits follow that choice. So rows
are dealt out to blocks of one size, the last filled up with zeros, and every block is one product of the same shape.
Up to a block's size a decoding step reads the weights once, as ever; a long prompt reads them once a block, and its
products are too narrow to reach the chip's speed. What that costs is not measured yet. Quantised matrices need no
blocks: their kernel has one way to cut and sum for any number of rows, if it is asked for.

Norms, rotations, activations and attention need nothing of the kind: their kernels compute each row by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.llama import Llama
from engine.models.moe import Gate, SparseMLP
from engine.quantization.linear import Linear

NUM_ROWS = 128  # below some 180 rows, reading the weights takes longer than multiplying with them, on an H200


class FixedRows(nn.Module):
    """A module that computes row by row, called with blocks of so many rows only."""

    def __init__(self, module: nn.Module, num_rows: int) -> None:
        super().__init__()
        self.module, self.num_rows = module, num_rows

    def forward(self, x: Tensor, *others: object) -> Tensor:
        """x: [num_tokens, num_inputs]; others: handed on. Returns [num_tokens, num_outputs]"""
        num_tokens = x.shape[0]
        blocks = torch.split(F.pad(x, (0, 0, 0, -num_tokens % self.num_rows)), self.num_rows)
        products = [self.module(block, *others) for block in blocks]
        whole: Tensor = products[0] if len(products) == 1 else torch.cat(products)
        return whole[:num_tokens]


def fix_rows(model: Llama, num_rows: int = NUM_ROWS) -> None:
    """Makes every product of the model one of `num_rows` rows, in place. Call it when the weights are packed.

    ValueError where the products of this device depend on a row's place in them all the same.
    """
    kinds = (nn.Linear, Linear, Gate, SparseMLP)
    inside = {part for module in model.modules() if isinstance(module, SparseMLP) for part in module.modules()}
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in children:
        if isinstance(child, kinds) and parent not in inside and not _has_independent_rows(child):
            setattr(parent, name, FixedRows(child, num_rows))
    _check_places(model, num_rows)


def _has_independent_rows(module: nn.Module) -> bool:
    """Whether it has them, or has been given a method that does."""
    if not isinstance(module, Linear):
        return False
    method = module.method.with_independent_rows()
    if method is None:
        return False
    module.method = method
    return True


@torch.inference_mode()
def _check_places(model: Llama, num_rows: int) -> None:
    """Multiplies, once for every shape, rows that are all the same."""
    weight = model.embed_tokens.weight
    seen: set[tuple[int, int]] = set()
    for fixed in [module for module in model.modules() if isinstance(module, FixedRows)]:
        if isinstance(fixed.module, (nn.Linear, Linear)):
            shape = fixed.module.in_features, fixed.module.out_features
            if shape not in seen:
                seen.add(shape)
                row = torch.linspace(-1.0, 1.0, shape[0], device=weight.device, dtype=weight.dtype)
                out = fixed.module(row.expand(num_rows, -1).contiguous())
                if not torch.equal(out, out[:1].expand_as(out)):
                    raise ValueError(
                        f"device.determinism is strict, but a product of {num_rows} rows, {shape[0]} inputs and "
                        f"{shape[1]} outputs depends on a row's place here; set device.determinism to fast"
                    )
