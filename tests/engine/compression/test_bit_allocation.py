"""A budget of bytes goes where it saves most."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.compression.bit_allocation import Choice, allocate, convex_hull

BITS = (4, 6, 8)


@st.composite
def units(draw: st.DrawFn) -> dict[str, list[Choice]]:
    """As those of a model: more bits take more, and lose less."""
    found = {}
    for index in range(draw(st.integers(1, 5))):
        size, loss = draw(st.integers(1, 50)), draw(st.floats(0, 10))
        factors = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2)), reverse=True)
        losses = [loss, loss * factors[0], loss * factors[1]]
        found[str(index)] = [Choice(bits, bits * size, one) for bits, one in zip(BITS, losses, strict=True)]
    return found


@given(units(), st.floats(0, 1))
def test_no_choice_within_the_budget_is_better_by_more_than_one_upgrade(
    units: dict[str, list[Choice]], share: float
) -> None:
    least, most = (sum(pick(c.num_bytes for c in one) for one in units.values()) for pick in (min, max))
    budget = int(least + share * (most - least))
    bits = allocate(units, budget)
    chosen = [next(c for c in units[name] if c.bits == bits[name]) for name in units]
    assert sum(one.num_bytes for one in chosen) <= budget
    best = min(
        sum(one.loss for one in choice)
        for choice in product(*units.values())
        if sum(one.num_bytes for one in choice) <= budget
    )
    largest = max(abs(a.loss - b.loss) for one in units.values() for a in one for b in one)
    assert best - 1e-9 <= sum(one.loss for one in chosen) <= best + largest + 1e-9


def test_a_budget_for_everything_is_spent() -> None:
    units = {name: [Choice(bits, bits, loss / bits) for bits in BITS] for name, loss in (("a", 1.0), ("b", 5.0))}
    assert allocate(units, 16) == {"a": 8, "b": 8}
    assert allocate(units, 8) == {"a": 4, "b": 4}
    assert allocate(units, 12) == {"a": 4, "b": 8}


def test_the_least_that_is_needed_is_said() -> None:
    with pytest.raises(ValueError, match="4 bytes, but 3 are left"):
        allocate({"a": [Choice(4, 4, 1.0), Choice(8, 8, 0.1)]}, 3)


def test_what_costs_more_and_loses_as_much_is_on_no_hull() -> None:
    hull = convex_hull([Choice(4, 4, 1.0), Choice(6, 6, 0.9), Choice(8, 8, 0.1), Choice(7, 7, 1.0)])
    assert [choice.bits for choice in hull] == [4, 8]
