"""Rotary position embedding (Su et al., 2021) in the half-rotation convention of GPT-NeoX and Llama.

Pair i of a head is (x[i], x[i + R/2]), and is turned by the angle a_i of its position:

    x'[i]       = x[i]       * cos a_i - x[i + R/2] * sin a_i
    x'[i + R/2] = x[i + R/2] * cos a_i + x[i]       * sin a_i

R, the rotated width, may be smaller than the head (partial rotary); the other elements are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_factors(angles: Tensor, dtype: torch.dtype = torch.float32, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two factors that `apply_rope` takes, made once per step: cos = (c, c) and sin = (-s, s).

    angles: [num_tokens, R / 2] in radians, float32; `scale` multiplies both (YaRN's attention factor).
    Returns cos, sin: [num_tokens, R] in `dtype`.
    """
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions, and returns new tensors.

    q: [num_tokens, num_heads, head_dim]; k: [num_tokens, num_kv_heads, head_dim]
    cos, sin: [num_tokens, R] of `rope_factors` (the first half of sin is negated), R <= head_dim, in q's dtype
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((_rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(width // 2, dims=-1), sin)
