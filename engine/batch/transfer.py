"""Small arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    array: npt.NDArray[np.int64] | npt.NDArray[np.float64] | npt.NDArray[np.bool_], device: torch.device
) -> Tensor:
    """The array as a tensor. To a GPU the copy is only queued: it waits for nobody. The array may change afterwards."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
