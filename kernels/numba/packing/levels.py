"""Levels of weights, the small integers that scales multiply, to and from the planes of bits that tiles read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.numba.core.formats import GROUP, IntegerFormat
from kernels.numba.core.lanes import LANES
from kernels.numba.core.memory import flags, integers
from kernels.numba.kernel_cache import kernel


@kernel("void(int64, int64, int64, int64, int64, int64, int64)", nogil=True)
def _fill_planes(levels, words, num_panels, num_groups, depths, planes, num_planes):
    """Writes the words of levels. levels: uint8 [num_panels * 16, num_groups * 32]; planes: int64 [num_planes, 2], bits
    and place of each. All but the numbers are addresses."""
    of_planes, depth, lane_bits = integers(planes, 2 * num_planes), num_groups * GROUP, 32 // depths
    target = words
    for panel in range(num_panels):
        for group in range(num_groups):
            for plane in range(num_planes):
                bits, place = of_planes[2 * plane], of_planes[2 * plane + 1]
                mask, num_steps = (1 << bits) - 1, lane_bits // bits
                for word in range(bits * GROUP // 32):
                    first = group * GROUP + word * num_steps * depths
                    for column in range(LANES):
                        own = flags(levels + (panel * LANES + column) * depth + first, num_steps * depths)
                        total = 0
                        for step in range(num_steps):
                            for lane in range(depths):
                                level = (np.int64(own[step * depths + lane]) >> place) & mask
                                total |= level << (lane * lane_bits + bits * step)
                        out = flags(target + column * 4, 4)
                        for byte in range(4):
                            out[byte] = np.uint8((total >> (8 * byte)) & 255)
                    target += 4 * LANES


def pack_planes(levels: Tensor, weights: IntegerFormat) -> Tensor:
    """uint8 [panels, 16, depth] -> int32 [panels, groups, words, 16], as `formats.IntegerFormat` has them."""
    num_panels, _, depth = levels.shape
    groups, levels = depth // GROUP, levels.contiguous()
    words = torch.empty(num_panels, groups, weights.group_bytes // (4 * LANES), LANES, dtype=torch.int32)
    planes = torch.tensor(weights.planes)
    sizes = (num_panels, groups, weights.depths, planes.data_ptr(), len(planes))
    _fill_planes(levels.data_ptr(), words.data_ptr(), *sizes)
    return words


def unpack_planes(words: Tensor, weights: IntegerFormat) -> Tensor:
    """The inverse of `pack_planes`."""
    num_panels, groups = words.shape[:2]
    lane_bits, skipped = 32 // weights.depths, 0
    levels = torch.zeros(num_panels, LANES, groups, GROUP, dtype=torch.uint8)
    for bits, place in weights.planes:
        num_words, num_steps = bits, lane_bits // bits  # of a group, and steps in each
        some = words[:, :, skipped : skipped + num_words]
        lanes = [lane_bits * lane for lane in range(weights.depths)]
        shifts = torch.tensor([[bits * step + lane for lane in lanes] for step in range(num_steps)])
        parts = (some.unsqueeze(-1) >> shifts.flatten().int()) & ((1 << bits) - 1)
        levels |= parts.permute(0, 3, 1, 2, 4).flatten(3).to(torch.uint8) << place
        skipped += num_words
    return levels.flatten(2)
