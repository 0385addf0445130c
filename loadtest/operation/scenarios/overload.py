"""Three times as many requests as the server can answer, for minutes: those that it takes are served as well as ever.

Open loop at three times the capacity. The server's memory stays within 5%, and it answers as many tokens per second as
at its best, 5% less at most. Whom it takes waits no longer for the first token than `limits.max_queue_seconds` and what
the wait is at 0.9 of the capacity (both at the 99th percentile). All others get a 429 with a Retry-After, within 50 ms.
"""

from __future__ import annotations

from loadtest.operation.load import LEAD, REFUSED, Load, Run, growth, percentile_of, watched_memory
from loadtest.operation.stage import Stage

QUEUE_SECONDS = 2.0
SECONDS = 300.0
OVERLOAD = 3.0
QUICK_REFUSAL = 0.050  # seconds
GOODPUT = 0.95  # of the best
MEMORY_GROWTH = 0.05


async def run(stage: Stage) -> None:
    seconds, seats = stage.seconds(SECONDS), stage.options.num_clients
    settings = (f"limits.max_queue_seconds={QUEUE_SECONDS}", f"scheduler.max_num_seqs={seats}")
    async with stage.serve(*settings, has_whole_memory=True) as served:
        load = Load(stage, stage.target(served), prompt="lognormal:96:0.4", output="lognormal:48:0.5")
        await load.closed(seats, max(seconds / 10, 3.0))  # warms up
        best = await load.closed(seats, max(seconds / 4, 5.0))
        capacity = best.answers_per_second
        busy = await load.open(0.9 * capacity, max(seconds / 2, 5.0))
        async with watched_memory(served.pid) as memory:
            over = await load.open(OVERLOAD * capacity, seconds)
    _check(stage, best=best, busy=busy, over=over, memory=memory)


def _check(stage: Stage, *, best: Run, busy: Run, over: Run, memory: list[float]) -> None:
    findings = stage.findings
    peak = max(best.tokens_per_second, busy.tokens_per_second)
    share = over.tokens_per_second / peak
    findings.check(
        f"goodput is at least {GOODPUT:.0%} of the best", share >= GOODPUT, f"{share:.1%} of {peak:.1f} tokens/s"
    )
    calm, first = busy.first_token_seconds(99), over.first_token_seconds(99)
    findings.check(
        "the p99 of the first token of those that are taken is at most limits.max_queue_seconds and that at 0.9",
        first <= QUEUE_SECONDS + calm,
        f"{first:.3f} s; {QUEUE_SECONDS:g} s and {calm:.3f} s",
    )
    refusals = over.failures(REFUSED)
    took = [refusal.failed_at - refusal.started_at for refusal in refusals]
    slow, longest = percentile_of(took, 99), max(took, default=0.0)
    findings.check(
        f"99 of 100 refusals come within {1000 * QUICK_REFUSAL:g} ms",
        bool(took) and slow <= QUICK_REFUSAL,
        f"p99 {1000 * slow:.1f} ms, the longest {1000 * longest:.1f} ms, of {len(took)}",
    )
    without = sum(refusal.retry_after is None for refusal in refusals)
    findings.check("every refusal says when to come again", not without, f"{without} do not")
    findings.check("nothing else fails", not over.other_failures, over.other_failures)
    grown = growth(memory, begin=LEAD)
    findings.check(f"memory stays within {MEMORY_GROWTH:.0%}", abs(grown) <= MEMORY_GROWTH, f"{grown:+.2%}")
    findings.note(
        capacity_answers_per_second=best.answers_per_second,
        tokens_per_second={
            "closed": best.tokens_per_second, "0.9": busy.tokens_per_second, "3.0": over.tokens_per_second,
        },
        first_token_p50={"0.9": busy.first_token_seconds(50), "3.0": over.first_token_seconds(50)},
        first_token_p99={"0.9": calm, "3.0": first},
        refusal_seconds={"p50": percentile_of(took, 50), "p99": slow, "max": longest},
        num_answered=len(over.answers), num_refused=len(refusals), num_refused_at_0_9=len(busy.failures(REFUSED)),
        memory_first=memory[0] if memory else None, memory_last=memory[-1] if memory else None, memory_growth=grown,
    )  # fmt: skip
