"""What a step costs by its rows: measured at the start, and followed while requests are served.

A row beyond the first is nearly free while the weights are read for it anyway, and then costs what its arithmetic
costs, in stairs of the height of a kernel's tile. Both are the machine's and the model's own, so they are measured.
What contexts cost beside that is `engine.scheduling.step_times`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
MORE_ROWS = (*ROWS, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)  # of steps that read long prompts
_PACE_OF_ALL = 0.02  # by which a step that took longer, or less, moves what is known of all sizes: the machine's speed
_PACE_OF_ONE = 0.01  # and of its own size beside that, if others were seen lately: two medians that follow
_FIRST_PACE = 0.05  # of its own size, as long as few were seen
_NUM_FIRST = 16
_LATELY = 64  # steps


class StepCosts:
    """Seconds of a step, by the number of its rows. Between sizes that were seen, what is known is interpolated."""

    def __init__(self, measured: Mapping[int, float] | None = None, sizes_to_follow: Sequence[int] = ROWS) -> None:
        """measured: seconds of steps of some sizes, at the start. Without any, a row costs as much as a step.

        sizes_to_follow: rising; a step of more rows than the last teaches nothing
        """
        self._rows = sizes_to_follow
        known = dict(sorted((measured or {1: 1.0, 2: 2.0}).items()))
        sizes = np.array(list(known), dtype=np.float64)
        seconds = np.maximum.accumulate(np.array(list(known.values()), dtype=np.float64))
        all_sizes = np.array(self._rows, dtype=np.float64)
        shape = np.interp(all_sizes, sizes, seconds)
        slope = seconds[-1] / sizes[-1] / 4  # beyond the largest, on the line of the last two, and never flat
        if len(sizes) > 1:
            slope = max((seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]), slope)
        beyond = all_sizes > sizes[-1]
        shape[beyond] = seconds[-1] + (all_sizes[beyond] - sizes[-1]) * slope
        self._scale = 1.0  # the machine's speed now
        self._shape: list[float] = shape.tolist()  # seconds by size, at scale 1
        self._rising: list[float] = self._shape  # the same, nowhere falling
        self._num_seen = [0] * len(self._rows)
        self._last_size, self._num_alike = -1, _LATELY  # steps of one size, until now
        self._table: list[float] | None = None

    def learn(self, num_rows: int, seconds: float) -> None:
        """Notes a step. One that the machine's other work has held up counts as little as one that it has not."""
        if num_rows < 1 or num_rows > self._rows[-1] or seconds <= 0:
            return
        index = min(bisect_left(self._rows, num_rows), len(self._rows) - 1)
        self._num_seen[index] += 1
        self._num_alike = 0 if 0 <= self._last_size != index else self._num_alike + 1
        self._last_size = index
        is_slower = seconds > self.seconds(num_rows)
        self._scale *= 1 + _PACE_OF_ALL if is_slower else 1 / (1 + _PACE_OF_ALL)
        if self._num_alike < _LATELY:
            pace = _FIRST_PACE if self._num_seen[index] <= _NUM_FIRST else _PACE_OF_ONE
            self._shape[index] *= 1 + pace if is_slower else 1 / (1 + pace)
            self._rising = list(accumulate(self._shape, max))
            self._table = None

    def seconds(self, num_rows: int) -> float:
        """Of a step of so many rows."""
        rows = self._rows
        index = bisect_left(rows, num_rows)
        if index == len(rows):
            return self._scale * self._rising[-1] * num_rows / rows[-1]
        high, above = rows[index], self._rising[index]
        if high == num_rows or index == 0:
            return self._scale * above
        low, below = rows[index - 1], self._rising[index - 1]
        return self._scale * (below + (above - below) * (num_rows - low) / (high - low))

    @property
    def scale(self) -> float:
        """Seconds of a unit of `table`."""
        return self._scale

    def table(self) -> list[float]:
        """Of steps of 0, 1, 2, ... rows, up to the largest of `ROWS`, in units of `scale`. [512 + 1]"""
        if self._table is None:
            self._table = np.interp(np.arange(ROWS[-1] + 1), self._rows, self._rising).tolist()
        return self._table
