"""8-bit codes of keys and values, defined: the elements of a token and head share a scale, which is theirs alone.

So a code depends on its token and nothing else, whatever is stored before, after or beside it. The scale takes the
largest magnitude to the largest code: an int8 is off by at most a 254th of that magnitude, an e4m3 by 2^-4 of the
element itself, or by 2^-10 of 1/448 of that magnitude where it is small ("FP8 Formats for Deep Learning", Micikevicius
et al. 2022, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 1e-30  # magnitude; what is all below it is stored as zeros, since its scale would have few bits


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales, so that x ~ codes * scales[..., None].

    x: [..., head_dim] floats; dtype: a key of LARGEST_CODE
    Returns codes: [..., head_dim] of dtype, and scales: [...] float32; zeros, and a scale that is NaN, for a token and
    head with any element that is no finite number: attention to it is NaN then, as it is with floats.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    is_finite = x.isfinite().all(dim=-1, keepdim=True)
    steps = LARGEST_CODE[dtype]
    is_some = is_finite & (largest > SMALLEST)
    inverse = largest.new_tensor(steps) / largest  # `steps / largest` would be a product with the rounded reciprocal
    scaled = torch.where(is_some, x * inverse, 0.0)
    codes = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    scales = torch.where(is_finite, torch.where(is_some, largest / steps, 0.0), torch.nan)
    return codes, scales.squeeze(-1)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """What attention is to see. codes: [..., head_dim]; scales: [...]. Returns float32."""
    return codes.float() * scales[..., None]
