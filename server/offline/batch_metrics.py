"""The metrics of batches, read at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.offline.batch_service import LINE_OUTCOMES, BatchService
from server.offline.records import STATUSES
from server.telemetry import metric_families as families


class BatchCollector(Collector):
    """Of one server; of one without a folder, all is zero."""

    def __init__(self, service: BatchService | None, model_name: str) -> None:
        self._service, self._model_name = service, model_name

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        service, name = self._service, self._model_name
        by_status = service.num_batches() if service is not None else dict.fromkeys(STATUSES, 0)
        family = families.BATCHES
        gauge = GaugeMetricFamily(family.full_name, family.help, labels=["model_name", *family.labels])
        for status, count in by_status.items():
            gauge.add_metric([name, status], count)
        yield gauge
        lines = service.line_counts if service is not None else dict.fromkeys(LINE_OUTCOMES, 0)
        family = families.BATCH_LINES
        counter = CounterMetricFamily(family.full_name, family.help, labels=["model_name", *family.labels])
        for outcome, count in lines.items():
            counter.add_metric([name, outcome], count)
        yield counter
        for family, value in (
            (families.BATCH_LINES_IN_WORK, service.num_lines_in_work if service is not None else 0),
            (families.BATCH_FILE_BYTES, service.num_file_bytes() if service is not None else 0),
        ):
            gauge = GaugeMetricFamily(family.full_name, family.help, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
