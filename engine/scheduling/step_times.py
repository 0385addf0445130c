"""How long a step takes, by all that it computes: learned from every step, and asked before one is made.

    seconds = speed of the machine now * ( rows + pairs + context that is read - rows without logits )
                                           a table  linear, with three coefficients

The table and the speed are `StepCosts`, as drafts are chosen by. What contexts cost is linear in `StepWork`'s counts;
its coefficients come from a Kalman filter (recursive least squares whose past fades), whose surprises are clipped, so
that a step that something else held up says little. Each part learns from what the others leave over.

That a step's time can be foretold from its tokens and contexts, so that chunks of prompts can be made to fit, is the
idea of Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671, section 3) and of Sarathi-Serve (arXiv 2403.02310,
section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from engine.scheduling.step_work import StepWork
from engine.speculation.step_costs import MORE_ROWS, StepCosts

_DRIFT = 0.01**2  # variance that a coefficient gains with each step, as a share of its first estimate
_NOISE = 0.05  # of a step's seconds, which are never quite what they were
_SURPRISE = 3.0  # standard deviations by which a step may be off and still be believed
_MOST = 20.0  # times its first estimate that a coefficient may become
_LEAST_SHARE = 0.1  # of a step's seconds that its rows take, whatever contexts do: keeps every estimate above zero


class ContextCosts(NamedTuple):
    """Seconds, at first, of what a step's rows alone do not say. All above 0.

    pair: one new token that attends to one of its context; kv_token: a token of context that is read; logits: what a
    row saves that has none
    """

    pair: float
    kv_token: float
    logits: float

    @classmethod
    def guessed(
        cls, measured: Mapping[int, float], *, flops_per_row: int, flops_per_pair: int, flops_per_logits: int
    ) -> ContextCosts:
        """Estimated from what rows were measured to take: as if attention ran at the speed of matrix products.

        flops_per_row: of a row with logits
        """
        few, many = min(measured), max(measured)
        rows = max(many - few, 1)
        seconds_per_flop = max(measured[many] - measured[few], measured[few] / 64) / rows / max(flops_per_row, 1)
        pair = seconds_per_flop * max(flops_per_pair, 1)
        return cls(pair, pair, seconds_per_flop * max(flops_per_logits, 1))


class StepTimes:
    """Seconds of steps by their work. Runs in the engine's thread."""

    def __init__(self, measured: Mapping[int, float], contexts: ContextCosts) -> None:
        """measured: seconds of steps by their rows, each with logits, at the start"""
        self._costs = StepCosts(measured, MORE_ROWS)
        self._units = (contexts.pair, contexts.kv_token, -contexts.logits)
        self._weights = [1.0, 1.0, 1.0]  # of the units
        self._variance = [[float(i == j) for j in range(3)] for i in range(3)]

    def seconds(self, work: StepWork) -> float:
        """Of a step of this work."""
        rows, context = self._parts(work)
        return max(rows + context, _LEAST_SHARE * rows)

    def learn(self, work: StepWork, seconds: float) -> None:
        """Notes what a step took. Readings that cannot be are left out."""
        if work.num_tokens < 1 or not 0.0 < seconds < float("inf"):
            return
        rows, context = self._parts(work)
        self._learn_contexts(self._features(work), seconds - rows, _NOISE * max(seconds, rows))
        self._costs.learn(work.num_tokens, max(seconds - context, _LEAST_SHARE * seconds))

    def _parts(self, work: StepWork) -> tuple[float, float]:
        """Seconds of the rows, and what contexts add."""
        features = self._features(work)
        return self._costs.seconds(work.num_tokens), sum(w * x for w, x in zip(self._weights, features, strict=True))

    def _features(self, work: StepWork) -> tuple[float, float, float]:
        pair, kv_token, logits = self._units
        scale = self._costs.scale
        num_without = max(work.num_tokens - work.num_logits, 0)
        return scale * pair * work.num_pairs, scale * kv_token * work.num_kv_tokens, scale * logits * num_without

    def _learn_contexts(self, features: tuple[float, float, float], seconds: float, noise: float) -> None:
        """One step of the filter. seconds: what was measured beyond the rows; noise: its standard deviation"""
        variance, weights = self._variance, self._weights
        along = [sum(v * x for v, x in zip(row, features, strict=True)) for row in variance]
        total = sum(a * x for a, x in zip(along, features, strict=True)) + noise * noise
        surprise = seconds - sum(w * x for w, x in zip(weights, features, strict=True))
        most = _SURPRISE * total**0.5
        surprise = min(max(surprise, -most), most)
        for i in range(3):
            weights[i] = min(max(weights[i] + along[i] / total * surprise, 0.0), _MOST)
            for j in range(3):
                variance[i][j] -= along[i] * along[j] / total
            variance[i][i] = min(variance[i][i] + _DRIFT, 1.0)
