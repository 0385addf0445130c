"""The matrix that makes logits of a drafter's states, as small as guesses allow.

What a draft costs on a CPU is reading this matrix, so it is kept in int8 with a scale for each row; that a guess's
score is off by a thousandth costs nothing, since the target checks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OutputMatrix:
    """values: [num_rows, hidden_size] int8 on a CPU, else float16. scales: [num_rows] float32; None: of floats"""

    values: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor) -> OutputMatrix:
        if matrix.device.type != "cpu":
            return cls(matrix.half(), None)
        matrix = matrix.float()
        scales = matrix.abs().amax(1).clamp_min(1e-12) / 127
        return cls((matrix / scales[:, None]).round().to(torch.int8), scales)

    @property
    def num_rows(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def multiply(self, x: Tensor) -> Tensor:
        """[n, hidden_size] float32 -> [n, num_rows] float32"""
        if self.scales is None:
            return F.linear(x.to(self.values.dtype), self.values).float()
        return torch._weight_int8pack_mm(x.contiguous(), self.values, self.scales)
