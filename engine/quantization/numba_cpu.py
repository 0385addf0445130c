"""Weight formats of the compiled CPU path, and the exchange of a model's nn.Linear modules for packed ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.quantization.huge_pages import HugePages
from kernels.numba.core.formats import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, SIZES
from kernels.numba.core.lanes import GROUP
from kernels.numba.packing.packing import SMALLEST_FIRST, PackedMatrix, fits_float16, pack, pack_exactly


class PackedLinear(nn.Module):
    """A linear layer's matrix as the compiled products read it."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias


def pack_linears(model: nn.Module, format_name: str, *, num_threads: int = 1) -> dict[str, int]:
    """Exchanges the nn.Linear modules of `model` for packed ones, in place; returns how many bytes each format has.

    Each frees its float matrix, so that memory peaks at a few matrices more than before. An embedding that shares its
    matrix with the output layer keeps it. format_name: of `engine.quantization.method.COMPILED_FORMATS`
    """
    places = [
        (parent, name, child.bias)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]

    memory = HugePages()

    def exchange(place: tuple[nn.Module, str, Tensor | None]) -> PackedMatrix:
        parent, name, bias = place
        matrix = pack_linear(getattr(parent, name).weight.detach(), format_name, is_output=name == "lm_head")
        matrix = replace(matrix, values=memory.keep(matrix.values))
        setattr(parent, name, PackedLinear(matrix, bias))
        return matrix

    num_bytes: dict[str, int] = {}
    with ThreadPoolExecutor(num_threads) as pool:  # most of the work holds no interpreter lock
        for matrix in pool.map(exchange, places):
            num_bytes[matrix.format_name] = num_bytes.get(matrix.format_name, 0) + matrix.num_bytes
    return num_bytes


@torch.no_grad()
def pack_linear(weight: Tensor, format_name: str, *, is_output: bool = False) -> PackedMatrix:
    """One matrix, [out_features, in_features] floats. is_output: whether its products are the logits"""
    if format_name == "none":
        return pack_exactly(weight, among=(BFLOAT16, FLOAT16)) or pack(weight, FLOAT32)
    wanted = {"fp16": FLOAT16, "int8": INT8, "int4": INT8 if is_output else INT4}[format_name]
    exact = pack_exactly(weight, among=[kind for kind in SMALLEST_FIRST if SIZES[kind] <= SIZES[wanted]])
    if exact is not None:
        return exact
    if not fits_float16(weight):  # nor would the scales and offsets of the integer formats
        return pack(weight, FLOAT32)
    return pack(weight, FLOAT16 if weight.shape[1] % GROUP else wanted)
