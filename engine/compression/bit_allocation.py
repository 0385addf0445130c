"""Which bits each unit of a model gets, so that a budget of bytes is spent where it changes the answers least.

A knapsack with one choice of several for each unit, solved greedily along each unit's convex hull of (bytes, loss):
the upgrade that saves most loss for a byte comes first (Sinha and Zoltners 1979, "The multiple-choice knapsack
problem", whose linear relaxation this is; the result is at most one unit's upgrade away from the best).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """What a unit would take with so many bits, and lose."""

    bits: int
    num_bytes: int
    loss: float


def allocate(units: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """The bits of each unit. budget: bytes that all of them may take; ValueError where the smallest do not fit."""
    hulls = {name: convex_hull(choices) for name, choices in units.items()}
    spent = sum(hull[0].num_bytes for hull in hulls.values())
    if spent > budget:
        raise ValueError(f"the least that its matrices take is {spent:,} bytes, but {budget:,} are left for them")
    places = dict.fromkeys(hulls, 0)
    upgrades = [(-_gain(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(upgrades)
    while upgrades:
        _, name = heapq.heappop(upgrades)
        hull, place = hulls[name], places[name]
        costs = hull[place + 1].num_bytes - hull[place].num_bytes
        if spent + costs > budget:
            continue  # others may be smaller
        spent += costs
        places[name] = place + 1
        if place + 2 < len(hull):
            heapq.heappush(upgrades, (-_gain(hull, place + 1), name))
    return {name: hulls[name][place].bits for name, place in places.items()}


def convex_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no mixture of others beats, from the smallest: each byte more saves less than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.num_bytes, one.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(hull: Sequence[Choice], place: int) -> float:
    return _slope(hull[place], hull[place + 1])


def _slope(small: Choice, large: Choice) -> float:
    """Loss that a byte saves."""
    return (small.loss - large.loss) / (large.num_bytes - small.num_bytes)
