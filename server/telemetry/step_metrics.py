"""The metrics of the engine's steps, summed in plain numbers, since steps are frequent, and exported at a scrape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.types import DEGRADED_MODES, DRAFT_OUTCOMES, PROMPT_LIMITS, StepStats
from server.telemetry import metric_families as families
from server.telemetry.distribution import Distribution
from server.telemetry.metric_families import Family

PHASES = ("schedule", "forward", "sample", "update", "propose")
MAX_POSITIONS = 16  # of drafts that have a series before one is accepted there


class Roofline:
    """What the forward passes of the last seconds achieved, against what the machine can do at most.

    A ceiling that was measured while the machine was busy is too low: whatever is achieved raises it.

    The roofline model: Williams, Waterman, Patterson, "Roofline" (CACM 2009). Older steps fade by exp(-time / 5 s), in
    time of forward passes, so an idle server shows its last value.
    """

    WINDOW = 5.0  # seconds

    def __init__(self) -> None:
        self.max_bytes_per_second = 0.0
        self.max_flops_per_second = 0.0
        self._bytes = 0.0
        self._flops = 0.0
        self._seconds = 0.0

    def raise_ceilings(self, bytes_per_second: float, flops_per_second: float) -> None:
        """What was measured at a start of the engine; 0 where nothing was. What is known to be possible stays so."""
        self.max_bytes_per_second = max(self.max_bytes_per_second, bytes_per_second)
        self.max_flops_per_second = max(self.max_flops_per_second, flops_per_second)

    def count(self, stats: StepStats) -> None:
        if stats.computing <= 0.0 or not stats.flops:  # nothing was computed, or it failed
            return
        fade = math.exp(-stats.computing / self.WINDOW)
        self._bytes = self._bytes * fade + stats.bytes_moved
        self._flops = self._flops * fade + stats.flops
        self._seconds = self._seconds * fade + stats.computing
        if self.max_bytes_per_second:
            self.max_bytes_per_second = max(self.max_bytes_per_second, self.bytes_per_second)
        if self.max_flops_per_second:
            self.max_flops_per_second = max(self.max_flops_per_second, self.flops_per_second)

    @property
    def bytes_per_second(self) -> float:
        return self._bytes / self._seconds if self._seconds else 0.0

    @property
    def flops_per_second(self) -> float:
        return self._flops / self._seconds if self._seconds else 0.0

    @property
    def ratio(self) -> float:
        """1 is a forward pass as fast as the machine allows; 0 where no ceiling was measured.

        A pass that both limits bind is bound by the slower one, hence the maximum.
        """
        memory = self.bytes_per_second / self.max_bytes_per_second if self.max_bytes_per_second else 0.0
        compute = self.flops_per_second / self.max_flops_per_second if self.max_flops_per_second else 0.0
        return max(memory, compute)


class StepMetrics(Collector):
    """All families that come from StepStats."""

    def __init__(self, model_name: str, proposer: str) -> None:
        self.roofline = Roofline()
        self._model_name = model_name
        self._proposer = proposer
        self._seconds = [Distribution(families.STEP_SECONDS) for _ in PHASES]
        self._num_tokens = Distribution(families.STEP_SIZE)
        self._progress = Distribution(families.STEP_PROGRESS)
        self._num_seqs = Distribution(families.STEP_SEQUENCES)
        self._paced_tokens = Distribution(families.PACED_PROMPT_TOKENS)
        self._paced_steps = dict.fromkeys(PROMPT_LIMITS, 0)
        self._time_ratio = Distribution(families.STEP_TIME_RATIO)
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted = [0]  # by position
        self._draft_outcomes = dict.fromkeys(DRAFT_OUTCOMES, 0)
        self._bytes = 0
        self._flops = 0
        self._blocks = (0, 0, 0)  # owned, cached, free
        self._degraded_modes: list[str] = []

    def count(self, stats: StepStats) -> None:
        for distribution, seconds in zip(self._seconds, _phase_seconds(stats), strict=True):
            distribution.observe(seconds)
        self._num_tokens.observe(stats.num_tokens)
        self._num_seqs.observe(stats.num_seqs)
        if stats.num_output_tokens:
            self._progress.observe(stats.num_output_tokens + stats.num_first_prompt_tokens)
        self._num_preemptions += stats.num_preemptions
        self._num_prefix_queries += stats.num_prefix_queries
        self._num_prefix_hits += stats.num_prefix_hits
        self._num_drafts += stats.num_drafts
        self._num_draft_tokens += stats.num_draft_tokens
        self._num_accepted += [0] * (len(stats.accepted_by_position) - len(self._num_accepted))
        for position, num_accepted in enumerate(stats.accepted_by_position):
            self._num_accepted[position] += num_accepted
        if stats.draft_outcome:
            self._draft_outcomes[stats.draft_outcome] += 1
        if stats.prompt_limit:
            self._paced_steps[stats.prompt_limit] += 1
            self._paced_tokens.observe(stats.num_prompt_tokens)
        if stats.predicted > 0.0:
            self._time_ratio.observe(stats.seconds / stats.predicted)
        self._bytes += stats.bytes_moved
        self._flops += stats.flops
        num_owned, num_cached = stats.num_owned_blocks, stats.num_cached_blocks
        self._blocks = (num_owned, num_cached, stats.num_blocks - num_owned - num_cached)
        self._degraded_modes = stats.degraded_modes
        self.roofline.count(stats)

    def begin(self, num_blocks: int, num_drafts: int) -> None:
        """Notes a new engine process: its KV cache, which is free, and the drafts that it may verify of a sequence."""
        self._blocks = (0, 0, num_blocks)
        self._num_accepted += [0] * (min(num_drafts, MAX_POSITIONS) - len(self._num_accepted))

    def forget_blocks(self) -> None:
        """The memory went with the process, and with it what had failed there."""
        self._blocks = (0, 0, 0)
        self._degraded_modes = []

    @property
    def kv_usage(self) -> float:
        """Owned share of the KV blocks, after the latest step."""
        return self._blocks[0] / (sum(self._blocks) or 1)

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        phases = dict(zip(PHASES, self._seconds, strict=True))
        yield self._histogram(families.STEP_SECONDS, {(phase,): each for phase, each in phases.items()})
        yield self._histogram(families.STEP_SIZE, {(): self._num_tokens})
        yield self._histogram(families.STEP_PROGRESS, {(): self._progress})
        yield self._histogram(families.STEP_SEQUENCES, {(): self._num_seqs})
        yield self._histogram(families.PACED_PROMPT_TOKENS, {(): self._paced_tokens})
        yield self._histogram(families.STEP_TIME_RATIO, {(): self._time_ratio})
        yield from self._collect_counters()
        owned, cached, free = self._blocks
        yield self._gauge(families.KV_BLOCKS, {("owned",): owned, ("cached",): cached, ("free",): free})
        yield self._gauge(families.KV_USAGE, {(): self.kv_usage})
        modes = self._degraded_modes
        yield self._gauge(families.ENGINE_DEGRADED, {(mode,): float(mode in modes) for mode in DEGRADED_MODES})
        roofline = self.roofline
        yield self._gauge(families.ACHIEVED_BYTES, {(): roofline.bytes_per_second})
        yield self._gauge(families.ACHIEVED_FLOPS, {(): roofline.flops_per_second})
        yield self._gauge(families.CEILING_BYTES, {(): roofline.max_bytes_per_second})
        yield self._gauge(families.CEILING_FLOPS, {(): roofline.max_flops_per_second})
        yield self._gauge(families.ROOFLINE, {(): roofline.ratio})

    def _collect_counters(self) -> Iterator[Metric]:
        proposer = (self._proposer,)
        yield self._counter(families.PREEMPTIONS, {(): self._num_preemptions})
        yield self._counter(families.PREFIX_QUERIES, {(): self._num_prefix_queries})
        yield self._counter(families.PREFIX_HITS, {(): self._num_prefix_hits})
        yield self._counter(families.DRAFTS, {proposer: self._num_drafts})
        yield self._counter(families.DRAFT_TOKENS, {proposer: self._num_draft_tokens})
        accepted = enumerate(self._num_accepted)
        yield self._counter(families.ACCEPTED_DRAFT_TOKENS, {(*proposer, str(position)): n for position, n in accepted})
        outcomes = self._draft_outcomes.items()
        yield self._counter(families.DRAFTED_STEPS, {(*proposer, outcome): n for outcome, n in outcomes})
        yield self._counter(families.PACED_STEPS, {(limit,): n for limit, n in self._paced_steps.items()})
        yield self._counter(families.MODEL_BYTES, {(): self._bytes})
        yield self._counter(families.MODEL_FLOPS, {(): self._flops})

    def _counter(self, family: Family, values: Mapping[tuple[str, ...], float]) -> Metric:
        metric = CounterMetricFamily(family.full_name, family.help, labels=("model_name", *family.labels))
        for labels, value in values.items():
            metric.add_metric((self._model_name, *labels), value)
        return metric

    def _gauge(self, family: Family, values: Mapping[tuple[str, ...], float]) -> Metric:
        metric = GaugeMetricFamily(family.full_name, family.help, labels=("model_name", *family.labels))
        for labels, value in values.items():
            metric.add_metric((self._model_name, *labels), value)
        return metric

    def _histogram(self, family: Family, values: Mapping[tuple[str, ...], Distribution]) -> Metric:
        metric = HistogramMetricFamily(family.full_name, family.help, labels=("model_name", *family.labels))
        for labels, distribution in values.items():
            distribution.add_to(metric, (self._model_name, *labels))
        return metric


def _phase_seconds(stats: StepStats) -> tuple[float, ...]:
    return stats.schedule, stats.forward, stats.sample, stats.update, stats.propose
