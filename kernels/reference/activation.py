"""Gated activations over the two halves of a merged gate and up projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU; Shazeer, 2020).

    gate_up: [..., 2 * intermediate_size], gate first. Returns [..., intermediate_size].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with the exact, error-function GELU. Shapes as in `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate).mul_(up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation of GELU, as Gemma has it. Shapes as in `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
