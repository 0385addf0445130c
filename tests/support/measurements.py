"""Measurements whose figures are known."""

from __future__ import annotations

from dataclasses import replace

from loadtest.report.session import Measurement, Scenario, Server
from loadtest.report.statistics import Distribution, Figures


def measurement(server: str, scenario: Scenario, rate: float, seconds: float, **fields: object) -> Measurement:
    """`rate` for output and prompt tokens alike; every latency is `seconds`."""
    latency = Distribution(10, seconds, seconds, seconds, seconds, seconds)
    figures = Figures(
        duration=1.0, num_answers=1, num_failures=0, errors={}, num_prompt_tokens=1, num_cached_tokens=0,
        num_output_tokens=1, num_output_tokens_are_counted=False, output_tokens_per_second=rate,
        prompt_tokens_per_second=rate, total_tokens_per_second=rate, requests_per_second=1.0, goodput=None,
        time_to_first_token=latency, time_per_output_token=latency, inter_token_latency=latency, end_to_end=latency,
        max_lateness=0.0,
    )  # fmt: skip
    plain = Measurement(server, scenario.name, 0, figures, None, False, None, None, 0.1, {})
    return replace(plain, **fields)


def server(name: str, precision: str = "", starts: tuple[float, ...] = ()) -> Server:
    return Server(name, "http://h", "m", "1", "completions", "{}", precision=precision, start_seconds=list(starts))
