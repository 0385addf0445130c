"""Two API keys beside each other: one that sends a hundred long prompts at once does not slow the other down.

The p99 of the first token of the modest key's requests is at most twice what it is while the other keeps to its half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from loadtest.operation.load import Load, Run
from loadtest.operation.served import ServedModel
from loadtest.operation.stage import Stage

SECONDS = 120.0
NUM_AT_ONCE = 100  # long prompts
LONG, SHORT = "1024", "64"  # tokens of prompts
RATE = 2.0  # of the modest key, requests per second
FACTOR = 2.0
KEYS = {"greedy": "key-of-the-greedy-one", "modest": "key-of-the-modest-one"}


async def run(stage: Stage) -> None:
    keys = stage.folder / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    async with stage.serve(f"access.key_file={keys}", "metrics.public=true", has_whole_memory=True) as served:
        await _compare(stage, served)


async def _compare(stage: Stage, served: ServedModel) -> None:
    seconds = stage.seconds(SECONDS)
    greedy = Load(stage, stage.target(served, api_key=KEYS["greedy"]), prompt=LONG, output="32")
    modest = Load(stage, stage.target(served, api_key=KEYS["modest"]), prompt=SHORT, output="16")
    whole = await greedy.closed(8, max(seconds / 3, 5.0))
    alone = await modest.open(RATE, max(seconds / 3, 5.0))
    share = whole.answers_per_second / 2
    fair, _ = await _both(modest.open(RATE, seconds), greedy.open(share, seconds))
    flooded, flood = await _both(modest.open(RATE, seconds), greedy.closed(NUM_AT_ONCE, seconds))
    before, now = fair.first_token_seconds(99), flooded.first_token_seconds(99)
    findings = stage.findings
    findings.check(
        f"beside {NUM_AT_ONCE} long prompts, the p99 of the modest key's first token is at most {FACTOR:g} times that "
        "beside the other's half",
        now <= FACTOR * before,
        f"{now:.3f} s, {now / before:.2f} times {before:.3f} s; alone {alone.first_token_seconds(99):.3f} s",
    )
    failed = {**fair.other_failures, **flooded.other_failures, **flood.other_failures}
    findings.check("nothing fails", not failed, failed)
    findings.note(
        greedy_answers_per_second_alone=whole.answers_per_second,
        greedy_answers_per_second_in_the_flood=flood.answers_per_second,
        modest_first_token_p50={
            "alone": alone.first_token_seconds(50), "fair": fair.first_token_seconds(50),
            "flooded": flooded.first_token_seconds(50),
        },
        modest_first_token_p99={"alone": alone.first_token_seconds(99), "fair": before, "flooded": now},
        num_modest=len(flooded.answers),
    )  # fmt: skip


async def _both(first: Coroutine[None, None, Run], second: Coroutine[None, None, Run]) -> tuple[Run, Run]:
    one, other = await asyncio.gather(first, second)
    return one, other
