"""What speculation gains: ratios of pairs of runs, what became of the drafts, and the goals; tables in markdown.

A pair is a method's run and the reference's of the same round. Several sessions are parts of one measurement: their
pairs of the same workload and load are taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import comb
from statistics import median

import msgspec
from tabulate import tabulate

from loadtest.report.metrics import OUTPUT_RATE, TOKEN_TIME, Metric, num_failures
from loadtest.report.session import Scenario, Server, Session

CONFIDENCE = 0.9
MIN_PAIRS = 7  # that a goal is judged by


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """A 90% confidence interval of the median, of whatever distribution: order statistics, interpolated.

    Hettmansperger and Sheather 1986, Statistics & Probability Letters 4. None for fewer than five values, which
    all lie on one side of the median too often.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        """Of the interval from the k-th smallest value to the k-th largest."""
        return 1 - 2.0 ** (1 - n) * sum(comb(n, i) for i in range(k))

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= CONFIDENCE), default=0)
    if k == 0:
        return None
    share = (coverage(k) - CONFIDENCE) / (coverage(k) - coverage(k + 1))
    weight = (n - k) * share / (k + (n - 2 * k) * share)
    low, high = ((1 - weight) * ordered[i] + weight * ordered[j] for i, j in ((k - 1, k), (n - k, n - k - 1)))
    return low, high


@dataclass(frozen=True)
class Point:
    """A method at one load. method: of its speculation, as it is configured; empty for a server that is not ours

    rates: output tokens/s of its runs; ratios: to the reference's, of the pairs; decoding: the reference's time per
    output token, over its own, which leaves out what prompts take; by_position: of the draft tokens at
    a position, the share that was accepted, times the share of drafts that were so long; empty: not known
    """

    workload: str
    concurrency: int
    server: str
    method: str
    is_auto: bool
    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    decoding: tuple[float, ...]
    num_tokens: int
    num_accepted: int
    num_rejected: int
    by_position: tuple[float, ...]
    num_failed: int

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval_of_median(self.ratios)

    @property
    def speed_up(self) -> str:
        return _with_interval(self.ratios) + (f", {self.num_failed} failed" if self.num_failed else "")

    @property
    def drafts(self) -> str:
        """The share of draft tokens that was accepted, and the tokens that a step of a sequence made."""
        num_drafted = self.num_accepted + self.num_rejected
        if not num_drafted:
            return "-"
        return f"{self.num_accepted / num_drafted:.0%}, {self.num_tokens / (self.num_tokens - self.num_accepted):.2f}"


def points_of(sessions: Sequence[Session]) -> list[Point]:
    """All points, by workload, server and load. The first server of a session is the reference."""
    servers = {server.name: server for session in sessions for server in session.servers}
    scenarios = {scenario.name: scenario for session in sessions for scenario in session.scenarios}
    return [_point(sessions, scenario, server) for scenario in scenarios.values() for server in servers.values()]


def _point(sessions: Sequence[Session], load: Scenario, of: Server) -> Point:
    scenario, server = load.name, of.name
    runs = [run for session in sessions for run in session.of(scenario, server)]
    figures = [run.figures for run in runs]
    drafts = [run.drafts for run in runs if run.drafts is not None]
    num_drafts = sum(each.num_drafts for each in drafts)
    accepted = [sum(column) for column in zip_longest(*(each.num_accepted for each in drafts), fillvalue=0)]
    config = msgspec.json.decode(of.speculation, type=dict) if of.speculation else {}
    return Point(
        load.workload,
        load.concurrency or 1,
        server,
        method=config.get("method", ""),
        is_auto=config.get("depth", "auto") == "auto",
        rates=tuple(run.figures.output_tokens_per_second for run in runs),
        ratios=tuple(ratio for session in sessions for ratio in _ratios(session, scenario, server, OUTPUT_RATE)),
        decoding=tuple(1 / ratio for session in sessions for ratio in _ratios(session, scenario, server, TOKEN_TIME)),
        num_tokens=sum(each.num_output_tokens for each in figures),
        num_accepted=sum(each.num_accepted_drafts for each in figures),
        num_rejected=sum(each.num_rejected_drafts for each in figures),
        by_position=tuple(number / num_drafts for number in accepted) if num_drafts else (),
        num_failed=sum(num_failures(session, scenario, server) for session in sessions),
    )


def _ratios(session: Session, scenario: str, server: str, metric: Metric) -> Iterator[float]:
    """To the reference, of the pairs of a session. A turn that was repeated counts with its last run that does."""

    def values(name: str) -> dict[int, float]:
        return {run.turn: metric.read(run) or 0.0 for run in session.of(scenario, name)}

    own, reference = values(server), values(session.servers[0].name)
    yield from (own[turn] / reference[turn] for turn in own if own[turn] and reference.get(turn))


def _with_interval(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    interval = interval_of_median(ratios)
    return f"{median(ratios):.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


@dataclass(frozen=True)
class Goal:
    """At least `minimum` times the reference, at every point that counts, or with `any_does` at one."""

    title: str
    minimum: float
    counts: Callable[[Point], bool]
    any_does: bool = False

    def verdict(self, points: Sequence[Point]) -> str:
        judged = [(point.ratio, point) for point in points if point.ratio is not None and self.counts(point)]
        if not judged:
            return f"{self.title}: not measured"
        ratio, point = (max if self.any_does else min)(judged, key=lambda pair: pair[0])
        of = "best" if self.any_does else "lowest"
        which = f"{of} of {len(judged)}: " if len(judged) > 1 else ""
        where = f"{which}{point.speed_up}, {point.server}, {point.workload}, concurrency {point.concurrency}"
        if (fewest := min(len(point.ratios) for _, point in judged)) < MIN_PAIRS:
            return f"{self.title}: not judged by {fewest} pairs, {MIN_PAIRS} are needed; {where}"
        return f"{self.title}: {'met' if ratio >= self.minimum else 'NOT MET'}; {where}"


def _at_one(workload: str, *methods: str) -> Callable[[Point], bool]:
    return lambda point: point.workload == workload and point.concurrency == 1 and point.method in methods


GOALS = (
    Goal("auto never below 0.98", 0.98, lambda point: point.is_auto and point.method not in ("", "none")),
    Goal("chat at concurrency 1, medusa, 1.5 or more", 1.5, _at_one("chat", "medusa")),
    Goal("copy at concurrency 1, ngram or suffix, 2.0 or more", 2.0, _at_one("copy", "ngram", "suffix"), any_does=True),
    Goal("sampled at concurrency 1, every method, 1.0 or more", 1.0, _at_one("sampled", "ngram", "suffix", "medusa")),
)


def speculation_tables(sessions: Sequence[Session]) -> str:
    """For each workload the speed-ups and what became of the drafts; then the goals, and whether texts differ."""
    points = points_of(sessions)
    parts = []
    for workload in dict.fromkeys(point.workload for point in points):
        here = [point for point in points if point.workload == workload]
        first = here[0].server
        speed_up = partial(_rate_or_speed_up, first)
        parts.append(_table(f"{workload}: output tokens/s, as multiples of {first}'s [90%]", here, speed_up))
        decoding = [point for point in here if point.server != first]
        title = f"{workload}: time per output token, {first}'s over the method's"
        parts.append(_table(title, decoding, lambda point: _with_interval(point.decoding)))
        parts.append(_table(f"{workload}: drafts accepted, tokens per step", here, lambda point: point.drafts))
    return "\n\n".join([*filter(None, parts), "\n".join(_remarks(sessions, points))])


def _rate_or_speed_up(reference: str, point: Point) -> str:
    if point.server != reference:
        return point.speed_up
    return f"{OUTPUT_RATE.text(median(point.rates))} tok/s" if point.rates else "-"


def _table(title: str, points: Sequence[Point], cell: Callable[[Point], str]) -> str:
    """A row for each server with anything to say, a column for each load. Empty if none has."""
    loads = sorted({point.concurrency for point in points})
    rows = []
    for server in dict.fromkeys(point.server for point in points):
        cells = {point.concurrency: cell(point) for point in points if point.server == server}
        if any(text != "-" for text in cells.values()):
            rows.append([server, *(cells.get(load, "-") for load in loads)])
    headers = [title, *(f"concurrency {load}" for load in loads)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""


def _remarks(sessions: Sequence[Session], points: Sequence[Point]) -> Iterator[str]:
    yield from (f"* {goal.verdict(points)}" for goal in GOALS)
    num_compared = sum(session.num_compared for session in sessions)
    differences = [difference for session in sessions for difference in session.differences]
    yield f"* {num_compared} answers compared between servers, {len(differences)} differ"
    yield from (f"  * {difference}" for difference in differences[:20])
    yield from (f"* ended early: {session.error}" for session in sessions if session.error)
    where = "; ".join(dict.fromkeys(session.environment.line for session in sessions))
    num_pairs = sorted({len(point.ratios) for point in points if point.ratios})
    yield ""
    yield (
        f"{where}. Medians of {' to '.join(map(str, [*num_pairs[:1], *num_pairs[1:][-1:]]))} pairs; in brackets "
        f"90% intervals, from five pairs on. A step is a sequence's: one token, and the drafts that were accepted."
    )
