"""The families that change with every token, in plain numbers that are shown at a scrape.

The event loop alone writes them, and a scrape reads them in the loop too: locks, of which the client library takes
three per token, would guard nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.telemetry import metric_families as families
from server.telemetry.distribution import Distribution


class TokenMetrics(Collector):
    """Generated tokens, and the times between them."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._num_tokens = 0
        self._gaps = Distribution(families.INTER_TOKEN_LATENCY)

    def count(self, num_tokens: int, seconds_since_last: float | None) -> None:
        """Tokens that came together, at least one; None: they are the first of a choice."""
        self._num_tokens += num_tokens
        if seconds_since_last is not None:
            self._gaps.observe(seconds_since_last / num_tokens, num_tokens)

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        tokens, gaps = families.GENERATION_TOKENS, families.INTER_TOKEN_LATENCY
        counter = CounterMetricFamily(tokens.full_name, tokens.help, labels=("model_name",))
        counter.add_metric((self._model_name,), self._num_tokens)
        yield counter
        histogram = HistogramMetricFamily(gaps.full_name, gaps.help, labels=("model_name",))
        self._gaps.add_to(histogram, (self._model_name,))
        yield histogram
