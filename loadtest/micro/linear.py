"""Which way to multiply with a weight matrix is fastest here? `python -m loadtest.micro.linear [--threads 2] [--save]`

Microseconds per product of [rows, in] with [out, in], weights streamed from memory. It decides
`engine.quantization.method`: from which size float32 is packed, and what a format gains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quantization.linear import LinearMethod, Shards
from engine.quantization.method import HalfMethod, Int8Method, PackedMethod, can_pack, has_float16_weights
from loadtest.micro.measure import Row, fastest, parse_arguments, report

SHAPES = [(960, 576), (3072, 576), (576, 1536), (4096, 4096), (49152, 576)]  # out, in; SmolLM2-135M's and a larger one
ROWS = [1, 2, 4, 8, 16, 32, 128]
STREAMED_BYTES = 96 << 20  # of float32 weights per shape
Product = Callable[[Tensor, int], Tensor]
W = TypeVar("W")


def main() -> None:
    arguments = parse_arguments(main.__doc__ or __doc__ or "")
    rows = []
    with torch.inference_mode():
        for shape in SHAPES:
            num_matrices = max(2, STREAMED_BYTES // (4 * shape[0] * shape[1]))
            weights = [torch.randn(shape) for _ in range(num_matrices)]
            products = list(_products(weights).items())
            for num_rows in ROWS:
                x = torch.randn(num_rows, shape[1])
                row: Row = {"out": shape[0], "in": shape[1], "rows": num_rows}
                for name, (dtype, product) in products:
                    work = partial(product, x.to(dtype))
                    row[name] = 1e6 * fastest(work, num_calls=num_matrices)
                rows.append(row)
    report("linear", rows, arguments)


def _products(weights: list[Tensor]) -> dict[str, tuple[torch.dtype, Product]]:
    """Each way by its name: the dtype of its activations, and the product with matrix number i."""
    half, single = torch.bfloat16, torch.float32
    products = {
        "float32": (single, lambda x, i: F.linear(x, weights[i])),
        "float32 packed": (single, _product(PackedMethod(min_float32_elements=0), weights)),
        "int8": (single, _product(Int8Method(), weights)),
    }
    if has_float16_weights():
        products["fp16"] = (single, _product(HalfMethod(), weights))
    if can_pack(half):
        halves = [weight.to(half) for weight in weights]
        products["bfloat16"] = (half, lambda x, i: F.linear(x, halves[i]))
        products["bfloat16 packed"] = (half, _product(PackedMethod(), halves))
        products["int8 in bfloat16"] = (half, _product(Int8Method(), halves))
    return products


def _product(method: LinearMethod[W], weights: list[Tensor]) -> Product:
    packed = [kept for weight in weights if (kept := method.pack(Shards.of(weight))) is not None]
    assert len(packed) == len(weights), "a format for these weights"
    return lambda x, i: method.apply(x, packed[i], None)


if __name__ == "__main__":
    main()
