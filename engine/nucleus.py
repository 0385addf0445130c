"""Sampling from a nucleus without finding it.

The nucleus (top-p) is the beginning of the row's order by (gap, token id). So: sample from the whole row, which takes
no sorting, and look whether the winner lies inside, which takes one sum over the tokens before it. If it does, it is
also the winner of the nucleus, whose tokens all took part. If not, nothing from the winner on is in the nucleus:
sample again from what comes before it. With p = 0.9 a tenth of the rows need a second look; in general about
1 + log(1 / p) looks are needed, whatever the size of the nucleus.

The sum is taken in float32 first. Where its rounding could matter, it is taken in integers, as `engine.truncation`
defines it.
"""

from __future__ import annotations

import numpy as np

from engine.candidates import Floats, Ints
from engine.gumbel import float_weights
from engine.truncation import nucleus_limit, token_weights

_ROUNDING = 2e-5  # of the total; far more than float32 sums of 2^18 exponentials are off


class Nucleus:
    """The nucleus of one row, of which it is only ever asked whether a token lies inside.

    gaps: [vocab_size], infinite for what min-p excludes; total: the sum of exp(-gap), within 1e-5 of it
    """

    def __init__(self, gaps: Floats, top_p: float, *, total: float) -> None:
        self.gaps, self.top_p = gaps, top_p
        self._total = total

    def before(self, token: int) -> Ints:
        """The tokens that come before one in the order (gap, token id), by ascending id."""
        tokens = np.flatnonzero(self.gaps <= self.gaps[token])
        kept: Ints = tokens[(tokens < token) | (self.gaps[tokens] < self.gaps[token])]
        return kept

    def holds(self, before: Ints) -> bool:
        """Whether a token lies inside, of which `before` are the tokens before it."""
        weight = float(float_weights(self.gaps[before]).sum())
        if weight < (self.top_p - _ROUNDING) * self._total:
            return True
        if weight > (self.top_p + _ROUNDING) * self._total:
            return False
        total = int(token_weights(self.gaps).sum())
        return int(token_weights(self.gaps[before]).sum()) < nucleus_limit(total, self.top_p)
