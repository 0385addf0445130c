"""The functions that our own models call between their matrix products, of one back end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

_PACKAGES = {
    "torch": "kernels.reference",
    "triton": "kernels.triton.layers",
}  # which name their modules and functions alike


class Route(Protocol):
    def __call__(self, router_logits: Tensor, top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Operations:
    """As `kernels.reference.norm`, `kernels.reference.activation` and `kernels.reference.moe` define them."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    route: Route
    mix_experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def load_operations(name: str) -> Operations:
    """Those of "torch", which run anywhere, or of "triton", which need a GPU or Triton's interpreter."""
    norm, activation, moe = (import_module(f"{_PACKAGES[name]}.{module}") for module in ("norm", "activation", "moe"))
    return Operations(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        silu_and_mul=activation.silu_and_mul,
        route=moe.route,
        mix_experts=moe.mix_experts,
    )
