"""One run, as text for the terminal."""

from __future__ import annotations

from loadtest.session import Measurement
from loadtest.statistics import Distribution, Figures


def report(measurement: Measurement) -> str:
    """Everything about one run, for people."""
    figures = measurement.figures
    counted = " (counted in chunks: the server gives no usage)" if figures.num_output_tokens_are_counted else ""
    lines = [
        f"{measurement.server}, {measurement.scenario}",
        f"  answers            {figures.num_answers} in {figures.duration:.2f} s, {figures.num_failures} failed",
        *(f"    {kind:<16} {n}   {measurement.failure_examples.get(kind, '')}" for kind, n in figures.errors.items()),
        f"  tokens             {figures.num_prompt_tokens} prompt ({figures.num_cached_tokens} cached), "
        f"{figures.num_output_tokens} output{counted}",
        f"  output tokens/s    {figures.output_tokens_per_second:.1f}",
        f"  total tokens/s     {figures.total_tokens_per_second:.1f}",
        f"  requests/s         {figures.requests_per_second:.3f}",
    ]
    if figures.goodput is not None:
        lines.append(f"  goodput            {figures.goodput:.3f} requests/s within the service level")
    lines.append(f"  {'milliseconds':<22}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}")
    lines += [_latency(name, distribution) for name, distribution in _distributions(figures)]
    return "\n".join([*lines, *_remarks(measurement)])


def _distributions(figures: Figures) -> list[tuple[str, Distribution | None]]:
    return [
        ("time to first token", figures.time_to_first_token),
        ("time per output token", figures.time_per_output_token),
        ("inter-token latency", figures.inter_token_latency),
        ("end to end", figures.end_to_end),
    ]


def _latency(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"  {name:<22}{'-':>9}"
    cells = "".join(f"{1000 * v:>9.2f}" for v in (values.mean, values.p50, values.p90, values.p99, values.max))
    return f"  {name:<22}{cells}"


def _remarks(measurement: Measurement) -> list[str]:
    cost = measurement.client_seconds_per_event
    remarks = [f"  this client used {measurement.client_load:.3f} cores"]
    if cost is not None:
        remarks[0] += f", {1e6 * cost:.1f} us per event with everything"
    if measurement.memory is not None:
        remarks.append(f"  server memory      {measurement.memory / 2**30:.2f} GiB")
    if measurement.figures.max_lateness > 0.005:
        lateness = f"{1000 * measurement.figures.max_lateness:.0f} ms"
        remarks.append(f"  the client sent up to {lateness} late (it is in the latencies)")
    if measurement.is_disturbed:
        remarks.append(f"  disturbed: {measurement.busy_cores:.2f} cores were in use by something else")
    return remarks
