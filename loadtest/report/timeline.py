"""One run over time: each request's latencies by when it was due, what came and went, how latencies are distributed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from loadtest.report.drawing import GRID, draw
from loadtest.report.session import Measurement, Sample

_NUM_BINS = 60  # of time, at most; none shorter than a second
_MOST_POINTS = 4000  # that a picture has one by one: beyond, points are pixels, and curves have fewer corners


def timeline_picture(measurement: Measurement, limits: Mapping[str, float]) -> str:
    """Six panels, as SVG, of a measurement with samples. limits: in seconds, by name: dotted lines"""
    return draw((11, 11), (3, 2), partial(_paint, measurement.samples, limits))


def _paint(samples: Sequence[Sample], limits: Mapping[str, float], panels: list[Axes]) -> None:
    first, gap, traffic, tokens, first_spread, gap_spread = panels
    answers = [sample for sample in samples if not sample.error]
    _scatter(first, answers, lambda sample: sample.time_to_first_token, limits.get("ttft"))
    first.set(title="Time to first token, of each request", xlabel="due at, s", ylabel="s")
    _scatter(gap, answers, lambda sample: sample.longest_gap, limits.get("itl"))
    gap.set(title="Longest wait between tokens, of each request", xlabel="due at, s", ylabel="s")
    _paint_traffic(traffic, samples)
    _paint_tokens(tokens, answers)
    _spread(first_spread, answers, lambda sample: sample.time_to_first_token, limits.get("ttft"))
    first_spread.set(title="Time to first token", xlabel="s", ylabel="share of the requests")
    _spread(gap_spread, answers, lambda sample: sample.longest_gap, limits.get("itl"))
    gap_spread.set(title="Longest wait between tokens", xlabel="s", ylabel="share of the requests")
    for failure in [sample for sample in samples if sample.error][:_MOST_POINTS]:
        first.axvline(failure.at, color="C3", linewidth=0.6, alpha=0.5)
    for axes in panels:
        axes.grid(color=GRID)
        axes.set_ylim(bottom=0)


def _kinds(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    return dict(sorted(kinds.items()))


def _scatter(axes: Axes, samples: Sequence[Sample], value: Callable[[Sample], float], limit: float | None) -> None:
    kinds = _kinds(samples)
    for kind, each in kinds.items():
        points = [s.at for s in each], [value(s) for s in each]
        are_pixels = len(samples) > _MOST_POINTS
        axes.plot(*points, "o", markersize=3, alpha=0.7, label=kind or None, rasterized=are_pixels)
    if limit is not None:
        axes.axhline(limit, color="black", linestyle=":", linewidth=1)
    if len(kinds) > 1:
        axes.legend(frameon=False)


def _spread(axes: Axes, samples: Sequence[Sample], value: Callable[[Sample], float], limit: float | None) -> None:
    """The share of requests with at most that value (empirical distribution function)."""
    for kind, each in _kinds(samples).items():
        shares = np.linspace(0, 1, min(len(each), _MOST_POINTS) + 1)[1:]
        values = np.quantile([value(sample) for sample in each], shares, method="inverted_cdf")
        axes.step(values, shares, where="post", label=kind or None)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle=":", linewidth=1)


def _edges(samples: Sequence[Sample]) -> NDArray[np.float64]:
    end = max((sample.at + sample.end_to_end for sample in samples), default=1.0)
    return np.linspace(0.0, max(end, 1.0), max(min(_NUM_BINS, int(end)), 1) + 1)


def _paint_traffic(axes: Axes, samples: Sequence[Sample]) -> None:
    edges = _edges(samples)
    due = np.histogram([sample.at for sample in samples], edges)[0] / np.diff(edges)
    axes.stairs(due, edges, color="C0", label="due, requests/s")
    moments = sorted([(s.at, 1) for s in samples] + [(s.at + s.end_to_end, -1) for s in samples])
    every = len(moments) // _MOST_POINTS + 1
    in_flight = np.cumsum([change for _, change in moments])[::every]
    axes.step([at for at, _ in moments[::every]], in_flight, where="post", color="C1", label="without an answer")
    axes.set(title="Traffic", xlabel="s")
    axes.legend(frameon=False)


def _paint_tokens(axes: Axes, samples: Sequence[Sample]) -> None:
    """Output tokens spread evenly from each answer's first to its last, and prompt tokens at its first."""
    edges = _edges(samples)
    rate = np.zeros(len(edges) - 1)
    prompts = np.zeros(len(edges) - 1)
    for sample in samples:
        begin, end = sample.at + sample.time_to_first_token, sample.at + sample.end_to_end
        if end > begin:
            shares = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0.0, None) / (end - begin)
            rate += sample.num_output_tokens * shares
        prompts[min(int(np.searchsorted(edges, begin, side="right")) - 1, len(prompts) - 1)] += sample.num_prompt_tokens
    axes.stairs(rate / np.diff(edges), edges, color="C0", label="output tokens/s")
    axes.stairs(prompts / np.diff(edges), edges, color="C1", label="prompt tokens/s, by the first token")
    axes.set(title="Tokens", xlabel="s")
    axes.legend(frameon=False)
