"""The measure of the client's own cost."""

from __future__ import annotations

from loadtest.selfcost import measure_cost


def test_the_clients_cost_per_event_can_be_measured() -> None:
    """How much it is depends on the machine; that it is a fraction of a millisecond does not."""
    assert 0 < measure_cost(num_streams=8, num_events=100, interval=0.001) < 1e-3
