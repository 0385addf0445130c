"""Half an hour of mixed traffic, with clients that leave and requests that are wrong: nothing piles up, all is counted.

At the end no KV block is owned; memory has grown by less than 2% in the second half; and the server has counted what
its clients did, status by status.
"""

from __future__ import annotations

from loadtest.operation.leaks import check_nothing_leaked
from loadtest.operation.load import growth, watched_memory
from loadtest.operation.mixed_traffic import LEFT, MixedTraffic, kinds
from loadtest.operation.served import ServedModel
from loadtest.operation.stage import Stage

SECONDS = 1800.0
WARM_UP_SECONDS = 30.0
MEMORY_GROWTH = 0.02  # in the second half
MAX_BODY_BYTES = 65536
API_KEY = "the-key-of-the-soak"
CLOSED = "499"  # the server's status for clients that left


async def run(stage: Stage) -> None:
    seconds = stage.seconds(SECONDS)
    settings = [f"server.api_keys={API_KEY}", "metrics.public=true", f"limits.max_body_bytes={MAX_BODY_BYTES}"]
    async with stage.serve(*settings) as served:
        traffic = MixedTraffic(
            served.url,
            API_KEY,
            stage.exchanges(48),
            kinds(has_chat=not stage.is_counting, max_body_bytes=MAX_BODY_BYTES),
            num_clients=stage.options.num_clients,
            seed=stage.options.seed,
        )
        await traffic.run_for(min(WARM_UP_SECONDS, seconds / 4))
        await served.wait_for(lambda seen: seen.is_idle, patience=60, what="the server became idle")
        before = await served.holdings()
        async with watched_memory(served.pid) as memory:
            await traffic.run_for(seconds)
        grown = growth(memory, begin=0.5)
        stage.findings.check(
            f"memory grows by less than {MEMORY_GROWTH:.0%} in the second half", grown < MEMORY_GROWTH, f"{grown:+.2%}"
        )
        stage.findings.note(memory_growth=grown, memory_first=memory[0], memory_last=memory[-1])
        await _check_counts(stage, served, traffic)
        await check_nothing_leaked(served, before, stage.findings)


async def _check_counts(stage: Stage, served: ServedModel, traffic: MixedTraffic) -> None:
    books, findings = traffic.books, stage.findings
    counters = await served.wait_for(lambda seen: seen.is_idle, patience=60, what="the server became idle")
    theirs, ours = counters.by_status(), books.statuses
    findings.check("every request had a status that is right for it", not books.num_surprises, books.surprises or "all")
    received = counters.num_received
    findings.check("as many requests came as were sent", received == books.num_sent, f"{received} of {books.num_sent}")
    loose = {"200", CLOSED, LEFT}  # a client that leaves does not know whether it had everything
    exact = {status: (ours[status], theirs[status]) for status in sorted({*ours, *theirs} - loose)}
    findings.check(
        "clients and /metrics count the same of every status", all(one == other for one, other in exact.values()), exact
    )
    whole, left = (ours["200"], theirs["200"]), (ours[LEFT], theirs[CLOSED])
    findings.check(
        "and the same of answers and of clients that left, together",
        sum(part[0] for part in (whole, left)) == sum(part[1] for part in (whole, left))
        and theirs["200"] >= ours["200"],
        f"answers {whole}, left {left}",
    )
    findings.note(num_sent=books.num_sent, by_kind=dict(books.by_kind), statuses=dict(theirs))
