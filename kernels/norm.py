"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and after a residual addition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32 or better, in x's dtype.

    x: [..., dim]; weight: [dim]
    """
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalises x + residual, and returns (normalised, x + residual): the second is the next residual.

    x, residual: [..., dim]; weight: [dim]. Neither input is changed.
    """
    residual = x + residual
    return rms_norm(residual, weight, eps), residual
