"""What a server of ours says of itself on `/metrics`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Counters:
    """One page of metrics."""

    samples: list[Sample]

    @staticmethod
    def parse(text: str) -> Counters:
        return Counters([sample for family in text_string_to_metric_families(text) for sample in family.samples])

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name and those labels; 0 where there are none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        )

    @property
    def num_received(self) -> int:
        return int(self.total("peregrine_requests_received_total"))

    def by_status(self) -> Counter[str]:
        """Requests for text that ended, by their HTTP status."""
        found: Counter[str] = Counter()
        for sample in self.samples:
            if sample.name == "peregrine_requests_total" and sample.value:
                found[sample.labels["status"]] += int(sample.value)
        return found

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or owns memory, and all that came has ended."""
        owned = self.total("peregrine_kv_blocks", state="owned")
        running, waiting = self.total("peregrine_requests_running"), self.total("peregrine_requests_waiting")
        return not (owned or running or waiting) and self.num_received == sum(self.by_status().values())
