"""What does a step pay for requests that wait? `python -m loadtest.micro.admission [--save]`

Microseconds of CPU time of `Scheduler.schedule` and `update`, without a model. 32 streams decode, and beside them:

"cold": four prompts of 131,072 tokens arrive at once that nobody has computed.
"cached": four arrive whose prefix is in the cache, all but a token.
"shared": 64 prompts of 32,768 tokens arrive that are equal: one is computed, the others wait for its blocks.
"no room": a prompt of 262,143 tokens, half of which are in the cache, waits for blocks that another has.

"first": the step in which they are first looked at. "longest", "median" and "all" are of the 40 steps from there on.
"steps": until the last of those that arrived has started, if it does.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

from engine.kv_cache.manager import KVCacheManager
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.types import Request, Sampled, SamplingParams, Sequence
from loadtest.micro.measure import Row, parse_arguments, report

BLOCK_SIZE = 16
NUM_STREAMS, STREAM_TOKENS = 32, 200
LONG, SHARED = 131_072, 32_768  # tokens
BUDGET = 2048  # tokens of a step
NUM_STEPS, NUM_ROUNDS = 40, 3
MAX_TOKENS = 4096


class World:
    """A scheduler under its streams; whatever is computed yields token 1."""

    def __init__(self, num_free_tokens: int) -> None:
        """num_free_tokens: of the KV cache, beside those that the streams will ever need."""
        num_tokens = NUM_STREAMS * (STREAM_TOKENS + MAX_TOKENS) + num_free_tokens
        limits = SchedulerLimits(max_num_seqs=256, max_num_batched_tokens=BUDGET, max_model_len=2 * LONG)
        self.scheduler = Scheduler(KVCacheManager(num_tokens // BLOCK_SIZE + 1, BLOCK_SIZE), limits)
        self._num_requests = 0
        for number in range(NUM_STREAMS):
            self.add([number] * STREAM_TOKENS)
        for _ in range(NUM_STREAMS):
            self.step()

    def add(self, prompt: list[int], max_tokens: int = MAX_TOKENS) -> Sequence:
        self._num_requests += 1
        params = SamplingParams(seed=0, max_tokens=max_tokens)
        request = Request(request_id=str(self._num_requests), prompt_token_ids=prompt, params=params)
        seq = Sequence(request, list(prompt))
        self.scheduler.add(seq)
        return seq

    def step(self) -> float:
        """Microseconds of CPU time."""
        started_at = time.process_time()
        batch = self.scheduler.schedule()
        scheduled_at = time.process_time()
        sampled = [Sampled([1] if item.samples else []) for item in batch]
        computed_at = time.process_time()
        self.scheduler.update(batch, sampled)
        return 1e6 * (time.process_time() - computed_at + scheduled_at - started_at)

    def compute(self, prompt: list[int]) -> None:
        """Leaves the prompt in the cache, and nothing running of it."""
        seq = self.add(prompt, max_tokens=1)
        while seq.finish_reason is None:
            self.step()


def cold() -> tuple[World, list[Sequence]]:
    world = World(5 * LONG)
    return world, [world.add([number] * LONG) for number in range(4)]


def cached() -> tuple[World, list[Sequence]]:
    world = World(5 * LONG)
    prompts = [[number] * LONG for number in range(4)]
    for prompt in prompts:
        world.compute(prompt)
    return world, [world.add([*prompt, 2]) for prompt in prompts]


def shared() -> tuple[World, list[Sequence]]:
    world = World(2 * LONG)
    return world, [world.add([*[1] * SHARED, number]) for number in range(64)]


def no_room() -> tuple[World, list[Sequence]]:
    world = World(2 * LONG)
    prompt = [1] * LONG
    world.compute(prompt)
    blocker = world.add([2] * (LONG + MAX_TOKENS // 4))
    while blocker.first_token_at is None:
        world.step()
    return world, [world.add([*prompt, *[3] * (LONG - 1)])]


CASES: dict[str, Callable[[], tuple[World, list[Sequence]]]] = {
    "cold": cold, "cached": cached, "shared": shared, "no room": no_room,
}  # fmt: skip


def measure(case: Callable[[], tuple[World, list[Sequence]]]) -> dict[str, float]:
    """Microseconds."""
    world, arrived = case()
    gc.collect()
    gc.disable()
    times: list[float] = []
    num_steps = 0
    while len(times) < NUM_STEPS:
        times.append(world.step())
        num_steps += not all(seq.block_table for seq in arrived)
    gc.enable()
    return {
        "first us": times[0],
        "longest us": max(times),
        "median us": statistics.median(times),
        "all us": sum(times),
        "steps": num_steps + 1,
    }


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    rows: list[Row] = []
    for name, case in CASES.items():
        rounds = [measure(case) for _ in range(NUM_ROUNDS)]
        row: Row = {"case": name}
        rows.append(row | {column: statistics.median(one[column] for one in rounds) for column in rounds[0]})
    report("admission", rows, arguments)


if __name__ == "__main__":
    main()
