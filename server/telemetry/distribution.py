"""How values are distributed over the buckets of a histogram."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily

from server.telemetry.metric_families import Family


class Distribution:
    """Counts of values by bucket, as a Prometheus histogram has them. For one thread: nothing is locked."""

    def __init__(self, family: Family) -> None:
        self._bounds = family.buckets
        self._counts = [0] * (len(family.buckets) + 1)  # the last is beyond all bounds
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, metric: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        counts = accumulate(self._counts)
        metric.add_metric(labels, list(zip(bounds, counts, strict=True)), self._sum)
