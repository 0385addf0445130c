"""The metrics under vLLM's names, computed at a scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.telemetry.metric_families import FAMILIES, Family, VllmName

PREFIX = "vllm:"
ENGINE_LABEL = {"engine": "0"}  # vLLM numbers its engine processes; here is one


class VllmCollector(Collector):
    """Renames the families of `registry`; it may itself be registered there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._is_collecting = False

    def collect(self) -> Iterator[Metric]:
        if self._is_collecting:  # asked by itself, below
            return
        self._is_collecting = True
        try:
            metrics = {metric.name: metric for metric in self._registry.collect()}
        finally:
            self._is_collecting = False
        for family in FAMILIES:
            metric = metrics.get(family.full_name.removesuffix("_total"))
            if metric is not None:
                yield from (rename(metric, family, alias) for alias in family.vllm)

    def describe(self) -> Iterator[Metric]:
        """Nothing: what will be there is known only at a scrape."""
        return iter(())


def rename(metric: Metric, family: Family, alias: VllmName) -> Metric:
    """Sums over the labels that the alias leaves out."""
    is_counter = family.kind == "counter"
    old_name = metric.name
    name = PREFIX + (alias.name.removesuffix("_total") if is_counter else alias.name)
    renamed = Metric(name, metric.documentation, metric.type)
    kept = {"model_name": "model_name", "le": "le", **dict(alias.labels)}
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in metric.samples:
        if alias.only and sample.labels[alias.labels[0][0]] not in alias.only:
            continue
        labels = tuple((kept[label], value) for label, value in sample.labels.items() if label in kept)
        key = (name + sample.name.removeprefix(old_name), labels)
        sums[key] = sums.get(key, 0.0) + sample.value
    for (sample_name, labels), value in sums.items():
        renamed.add_sample(sample_name, {**ENGINE_LABEL, **dict(labels)}, value)
    return renamed
