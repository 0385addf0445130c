"""The service level that goodput is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.client.outcome import Answer


@dataclass(frozen=True)
class ServiceLevel:
    """Limits in seconds; None is no limit.

    ttft: until the first token; tpot: mean per token after the first; itl: the longest wait between two tokens;
    e2e: until the end of the answer
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that there are, by name."""
        known = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2e": self.e2e}
        return {name: limit for name, limit in known.items() if limit is not None}

    def is_kept_by(self, answer: Answer) -> bool:
        """Whether the answer stayed within every limit."""
        return (
            _within(answer.time_to_first_token, self.ttft)
            and _within(answer.time_per_output_token or 0.0, self.tpot)
            and _within(max(answer.gaps, default=0.0), self.itl)
            and _within(answer.end_to_end, self.e2e)
        )


def parse_service_level(text: str) -> ServiceLevel:
    """`ttft=500ms,itl=0.05,...`: seconds, or milliseconds with `ms`. Raises ValueError for anything else."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot", "itl", "e2e"):
            raise ValueError(f"{part!r} is no limit; use ttft=, tpot=, itl= or e2e=, as in ttft=500ms,itl=50ms")
        try:
            limits[name] = _seconds(value)
        except ValueError as error:
            raise ValueError(f"{part!r}: {value!r} is no time; use seconds (0.05) or milliseconds (50ms)") from error
        if not 0 < limits[name] < float("inf"):
            raise ValueError(f"{part!r}: a limit is a time above 0")
    return ServiceLevel(**limits)


def _seconds(text: str) -> float:
    if text.endswith("ms"):
        return float(text[:-2]) / 1000
    return float(text.removesuffix("s"))


def _within(value: float, limit: float | None) -> bool:
    return limit is None or value <= limit
