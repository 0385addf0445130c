"""A circuit breaker for an optional part of steps: off after a failure, tried again after steps without one."""

from __future__ import annotations

FIRST_PAUSE = 256  # steps
MAX_PAUSE = 1 << 16


class CircuitBreaker:
    """Counts steps, not seconds: an idle engine learns nothing about what failed.

    is_open: the part is left out for now. Each failure doubles the pause before the next try, so that what keeps
    failing costs next to nothing; as many steps without one halve it again.
    """

    def __init__(self, *, first_pause: int = FIRST_PAUSE, max_pause: int = MAX_PAUSE) -> None:
        self.is_open = False
        self._first_pause, self._max_pause = first_pause, max_pause
        self._pause = first_pause // 2  # of the last failure
        self._num_quiet_steps = 0

    def trip(self) -> None:
        """Notes a failure."""
        self._pause = min(2 * self._pause, self._max_pause)
        self.is_open, self._num_quiet_steps = True, 0

    def step(self) -> bool:
        """Notes a step without a failure. True if this step closes the breaker again."""
        if not self.is_open and 2 * self._pause <= self._first_pause:
            return False
        self._num_quiet_steps += 1
        if self._num_quiet_steps < self._pause:
            return False
        was_open, self.is_open, self._num_quiet_steps = self.is_open, False, 0
        if not was_open:
            self._pause = max(self._pause // 2, self._first_pause // 2)
        return was_open
