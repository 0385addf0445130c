"""Load on a server while something happens to it, and what has to be true of every such disturbance afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from loadtest.operation.account import Account, Crowd
from loadtest.operation.leaks import check_nothing_leaked
from loadtest.operation.served import Holdings, ServedModel
from loadtest.operation.stage import Stage

WARM_UP_SECONDS = 4.0  # of load before what a server holds is noted: pools and buffers have their size then
LEAD_SECONDS = 1.0  # of load before anything happens


async def warmed_up(stage: Stage, served: ServedModel, crowd: Crowd) -> Holdings:
    """What the server holds when it has seen this load once, and is idle again. The crowd has learned the texts."""
    await crowd.learn()
    await crowd.run_for(min(WARM_UP_SECONDS, stage.seconds(WARM_UP_SECONDS)))
    await served.wait_for(lambda counters: counters.is_idle, patience=60, what="the server became idle")
    return await served.holdings()


async def disturb(crowd: Crowd, happen: Callable[[], Awaitable[None]], *, at_least: float) -> Account:
    """The account of requests that are sent from a moment before it happens until it is over, or `at_least` seconds."""

    async def act() -> None:
        await asyncio.sleep(LEAD_SECONDS)
        await happen()

    acting = asyncio.ensure_future(act())
    deadline = time.monotonic() + at_least
    try:
        await crowd.run(lambda: acting.done() and time.monotonic() > deadline)
    finally:
        acting.cancel()
    await acting
    return crowd.account


def check_all_answered(stage: Stage, account: Account) -> None:
    """Every request had its answer, with the text of an undisturbed run: nobody noticed more than a pause."""
    findings = stage.findings
    ended = f"{account.line()}; {account.examples}" if account.examples else account.line()
    findings.check("every request ended exactly once", account.num_ended == account.num_sent, account.line())
    findings.check("every answer is the one of an undisturbed run", account.num_answered == account.num_sent, ended)
    findings.note(num_sent=account.num_sent, num_answered=account.num_answered)


def check_ended_cleanly(stage: Stage, account: Account, *, may_break: bool = False) -> None:
    """Every request had its answer, or an error that says so; with `may_break` its connection may have ended."""
    findings = stage.findings
    ended = f"{account.line()}; {account.examples}" if account.examples else account.line()
    findings.check("every request ended exactly once", account.num_ended == account.num_sent, account.line())
    findings.check("no answer has another text than that of an undisturbed run", not account.wrong, ended)
    if not may_break:
        findings.check("no connection ended without an answer or an error", not account.broken, ended)
    findings.note(
        num_sent=account.num_sent, num_answered=account.num_answered, num_refused=account.refused.total(),
        num_failed=account.failed.total(), num_broken=account.broken.total(),
    )  # fmt: skip


async def check_counts(
    stage: Stage, served: ServedModel, *, num_sent: int, num_answered: int, num_others: int = 0, may_miss: bool = False
) -> None:
    """The server counts as many requests as its clients, and as many answers.

    num_others: requests of clients that cannot know what became of theirs. may_miss: nor whether they ever came in
    """
    counters = await served.wait_for(lambda seen: seen.is_idle, patience=60, what="the server became idle")
    received, statuses = counters.num_received, counters.by_status()
    least = num_sent - num_others if may_miss else num_sent
    are_equal = least <= received <= num_sent and num_answered <= statuses["200"] <= num_answered + num_others
    others = f", of them {num_others} that did not stay" if num_others else ""
    seen = f"clients: {num_sent} sent{others}, {num_answered} answered; server: {received} came, {dict(statuses)}"
    stage.findings.check("clients and /metrics count the same", are_equal, seen)


async def check_afterwards(stage: Stage, served: ServedModel, crowd: Crowd, before: Holdings) -> None:
    """A server that was disturbed counts right, holds no more than before, and answers as before."""
    await check_afterwards_beside(stage, served, crowd, before, num_others=0)


async def check_afterwards_beside(
    stage: Stage, served: ServedModel, crowd: Crowd, before: Holdings, *, num_others: int, may_miss: bool = False
) -> None:
    """The same, where others sent requests as well: see `check_counts`."""
    account, num_learned = crowd.account, crowd.num_learned
    if may_miss:
        num_others += account.num_sent - account.num_answered  # those whose connection ended, too
    num_sent = num_learned + account.num_answered + num_others
    num_answered = num_learned + account.num_answered
    await check_counts(
        stage, served, num_sent=num_sent, num_answered=num_answered, num_others=num_others, may_miss=may_miss
    )
    await check_nothing_leaked(served, before, stage.findings)
    after = Crowd(crowd.target, crowd.exchanges, num_clients=1)
    after.texts.update(crowd.texts)
    await after.ask_each_once()
    seen = after.account.line()
    stage.findings.check("it answers as before", after.account.num_answered == len(crowd.exchanges), seen)
