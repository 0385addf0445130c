"""PromQL made of metric families, so that no expression names a metric or a label that is not in the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.telemetry.metric_families import Family


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose series are asked for, and over which time: `selector` is what stands in the braces, `window` in brackets.

    Rates are summed before they are divided or turned into quantiles: no mean of quantiles is a quantile.
    """

    selector: str
    window: str

    def series(self, family: Family, suffix: str = "", **labels: str) -> str:
        """The series of a family whose labels match these regular expressions; `not_status` is `status!~`."""
        conditions = [self.selector] if self.selector else []
        for name, pattern in labels.items():
            label = name.removeprefix("not_")
            assert label in family.labels, f"{family.name} has no label {label}"
            conditions.append(f'{label}{"!~" if name != label else "=~"}"{pattern}"')
        return f"{family.full_name}{suffix}{{{', '.join(conditions)}}}" if conditions else family.full_name + suffix

    def rate(self, family: Family, by: Iterable[str] = (), **labels: str) -> str:
        """Per second, of a counter."""
        assert family.kind == "counter"
        return self._summed_rate(self.series(family, **labels), by)

    def increase(self, family: Family, by: Iterable[str] = ()) -> str:
        assert family.kind == "counter"
        return f"{_sum(by)} (increase({self.series(family)}[{self.window}]))"

    def sums(self, family: Family, by: Iterable[str] = ()) -> str:
        """Per second, of what a histogram has observed."""
        return self._summed_rate(self.series(family, "_sum"), by)

    def counts(self, family: Family, by: Iterable[str] = ()) -> str:
        """Per second, of a histogram's observations."""
        return self._summed_rate(self.series(family, "_count"), by)

    def mean(self, family: Family, by: Iterable[str] = ()) -> str:
        """Of what was observed; nothing where nothing was."""
        return ratio(self.sums(family, by), self.counts(family, by))

    def quantile(self, q: float, family: Family, by: Iterable[str] = ()) -> str:
        assert family.kind == "histogram"
        return f"histogram_quantile({q:g}, {self._summed_rate(self.series(family, '_bucket'), ('le', *by))})"

    def heatmap(self, family: Family) -> str:
        """Observations by bucket, in each interval."""
        return f"sum by (le) (increase({self.series(family, '_bucket')}[{self.window}]))"

    def gauge(self, family: Family, by: Iterable[str] = (), *, aggregate: str = "sum", **labels: str) -> str:
        assert family.kind == "gauge"
        return f"{_aggregate(aggregate, by)} ({self.series(family, **labels)})"

    def _summed_rate(self, series: str, by: Iterable[str]) -> str:
        return f"{_sum(by)} (rate({series}[{self.window}]))"


def ratio(part: str, whole: str, *, on: str = "") -> str:
    """part / whole, and nothing, rather than not a number, where there is no whole.

    on: the label that several parts have in common with their whole
    """
    matching = f" on ({on}) group_left ()" if on else ""
    return f"{part} /{matching} ({whole} > 0)"


def _sum(by: Iterable[str]) -> str:
    return _aggregate("sum", by)


def _aggregate(function: str, by: Iterable[str]) -> str:
    labels = ", ".join(by)
    return f"{function} by ({labels})" if labels else function
