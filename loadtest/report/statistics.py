"""From outcomes to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.client.outcome import Answer, Failure, Outcome
from loadtest.report.slo import ServiceLevel


@dataclass(frozen=True)
class Distribution:
    """Percentiles interpolate linearly between the two closest ranks (Hyndman and Fan 1996, type 7); all in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Distribution | None:
        """The distribution of these values; None if there are none, since zero would be a measurement."""
        if not values:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
        return Distribution(len(values), float(np.mean(values)), p50, p90, p99, float(np.max(values)))


@dataclass(frozen=True)
class Figures:
    """One run in numbers. Rates are per second of `duration`: from the first arrival to the last answer (or failure).

    Only complete answers count, in latencies and in rates alike; what failed is in `errors`, by kind.
    num_output_tokens_are_counted: the server gave no usage, so chunks with text were counted instead of tokens
    goodput: answers per second that kept the service level; None without one
    max_lateness: seconds by which this process sent a request after its intended arrival, at worst (open loop)
    num_accepted_drafts, num_rejected_drafts: tokens of speculative decoding; both 0 where answers say nothing of them
    """

    duration: float
    num_answers: int
    num_failures: int
    errors: dict[str, int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_output_tokens_are_counted: bool
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    goodput: float | None
    time_to_first_token: Distribution | None
    time_per_output_token: Distribution | None
    inter_token_latency: Distribution | None
    end_to_end: Distribution | None
    max_lateness: float
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0


def summarize(outcomes: Sequence[Outcome], service_level: ServiceLevel | None = None) -> Figures:
    """The figures of a run. Raises ValueError if there are no outcomes."""
    if not outcomes:
        raise ValueError("nothing was sent; ask for at least one request")
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    ended_at = max([a.finished_at for a in answers] + [f.failed_at for f in failures])
    duration = ended_at - min(outcome.started_at for outcome in outcomes)
    num_prompt_tokens = sum(answer.num_prompt_tokens for answer in answers)
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    per_token = [answer.time_per_output_token for answer in answers]
    return Figures(
        duration=duration,
        num_answers=len(answers),
        num_failures=len(failures),
        errors=dict(Counter(failure.kind for failure in failures).most_common()),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=sum(answer.num_cached_tokens for answer in answers),
        num_output_tokens=num_output_tokens,
        num_output_tokens_are_counted=any(answer.is_counted for answer in answers),
        output_tokens_per_second=num_output_tokens / duration,
        prompt_tokens_per_second=num_prompt_tokens / duration,
        total_tokens_per_second=(num_prompt_tokens + num_output_tokens) / duration,
        requests_per_second=len(answers) / duration,
        goodput=_goodput(answers, service_level, duration),
        time_to_first_token=Distribution.of([answer.time_to_first_token for answer in answers]),
        time_per_output_token=Distribution.of([seconds for seconds in per_token if seconds is not None]),
        inter_token_latency=Distribution.of([gap for answer in answers for gap in answer.inter_token_latencies()]),
        end_to_end=Distribution.of([answer.end_to_end for answer in answers]),
        max_lateness=max((answer.sent_at - answer.started_at for answer in answers), default=0.0),
        num_accepted_drafts=sum(answer.num_accepted_drafts for answer in answers),
        num_rejected_drafts=sum(answer.num_rejected_drafts for answer in answers),
    )


def _goodput(answers: list[Answer], service_level: ServiceLevel | None, duration: float) -> float | None:
    if service_level is None:
        return None
    return sum(service_level.is_kept_by(answer) for answer in answers) / duration
