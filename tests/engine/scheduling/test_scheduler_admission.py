"""What admission remembers of those who wait: what is hashed when, and who is looked up again."""

import random
from collections.abc import Callable

import pytest

from engine.kv_cache.groups import HASHES_AT_ONCE
from engine.kv_cache.manager import KVCacheManager, Prefix
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_plan import MAX_NUM_HASHES
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence


class CountingManager(KVCacheManager):
    """Counts what it is asked."""

    num_lookups = num_hashed = 0

    def find_prefix(self, seq: Sequence, *, max_num_hashes: int | None = None) -> Prefix | None:
        self.num_lookups += 1
        return super().find_prefix(seq, max_num_hashes=max_num_hashes)

    def hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        num_before = len(seq.block_hashes)
        hashes = super().hashes(seq, num_blocks)
        self.num_hashed += len(hashes) - num_before
        return hashes


class ForgetfulScheduler(Scheduler):
    """Looks at whoever waits in every step."""

    def _is_still_refused(self, seq: Sequence, num_reserved: int) -> bool:
        return False


MakeScheduler = Callable[..., Scheduler]


def make_scheduler(
    num_blocks: int,
    *,
    kind: type[Scheduler] = Scheduler,
    block_size: int = 1,
    budget: int = 64,
    max_num_seqs: int = 8,
    max_model_len: int | None = None,
    window: int | None = None,
) -> Scheduler:
    kv = CountingManager(num_blocks + 1, block_size, windows=[window])
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len or num_blocks * block_size,
        headroom=4,
    )
    return kind(kv, limits)


def add(scheduler: Scheduler, name: str, prompt: list[int], max_tokens: int = 1) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=max_tokens)
    seq = Sequence(Request(request_id=name, prompt_token_ids=prompt, params=params), list(prompt))
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler) -> list[Scheduled]:
    batch = scheduler.schedule()
    scheduler.update(batch, [Sampled([1] if item.samples else []) for item in batch])
    return batch


def run(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        assert step(scheduler)


def test_a_prompt_that_nobody_has_computed_is_hashed_as_it_is_computed() -> None:
    scheduler = make_scheduler(2000)
    seq = add(scheduler, "long", [2] * 1500)
    step(scheduler)
    assert seq.num_computed_tokens == 64
    assert len(seq.block_hashes) == HASHES_AT_ONCE
    run(scheduler)
    assert scheduler.kv.num_hashed == 1500  # each once


def test_a_prefix_is_looked_up_in_pieces_while_others_run_and_each_block_is_hashed_once() -> None:
    num_tokens = 3 * MAX_NUM_HASHES + 10
    scheduler = make_scheduler(num_tokens + 200, budget=2 * num_tokens, max_model_len=num_tokens + 10)
    prompt = [2] * num_tokens
    add(scheduler, "first", prompt)
    run(scheduler)
    add(scheduler, "stream", [3, 4], max_tokens=100)
    step(scheduler)
    scheduler.kv.num_hashed = 0
    seq = add(scheduler, "second", [*prompt, 5])
    num_steps = 0
    while not seq.num_cached_tokens:
        num_hashed = scheduler.kv.num_hashed
        batch = step(scheduler)
        assert "stream" in [item.seq.request.request_id for item in batch]
        assert scheduler.kv.num_hashed - num_hashed <= MAX_NUM_HASHES + 2  # those of what the step computed
        num_steps += 1
    assert seq.num_cached_tokens == num_tokens
    assert num_steps == 4
    assert sum(map(len, (seq.block_hashes,))) <= num_tokens + 1


def test_with_nobody_to_wait_for_it_a_prefix_is_looked_up_at_once() -> None:
    num_tokens = 2 * MAX_NUM_HASHES
    scheduler = make_scheduler(num_tokens + 10, budget=2 * num_tokens)
    add(scheduler, "first", [2] * num_tokens)
    run(scheduler)
    seq = add(scheduler, "second", [2] * (num_tokens + 1))
    assert [item.num_new_tokens for item in step(scheduler)] == [1]
    assert seq.num_cached_tokens == num_tokens


@pytest.mark.parametrize("window", [20, 5000])
def test_a_window_s_prefix_is_looked_up_in_pieces_too(window: int) -> None:
    num_tokens = 2 * MAX_NUM_HASHES + 10
    scheduler = make_scheduler(3 * num_tokens, budget=num_tokens, max_model_len=num_tokens + 200, window=window)
    add(scheduler, "stream", [3, 4], max_tokens=100)
    step(scheduler)
    seq = add(scheduler, "long", [2] * num_tokens)
    for _ in range(2):
        assert [item.seq.request.request_id for item in step(scheduler)] == ["stream"]
        assert len(seq.block_hashes) % MAX_NUM_HASHES == 0
    assert len(step(scheduler)) == 2


def test_who_has_a_prefix_in_common_with_a_prompt_in_progress_waits_for_it() -> None:
    scheduler = make_scheduler(500, budget=300)
    first = add(scheduler, "first", [2] * 200)
    others = [add(scheduler, f"r{number}", [*[2] * (40 * number), 3, *[4] * 50]) for number in range(1, 5)]
    assert [item.seq for item in step(scheduler)] == [first]
    assert [item.seq for item in step(scheduler)] == others
    assert [seq.num_cached_tokens for seq in others] == [40, 80, 120, 160]


@pytest.mark.parametrize("ending", ["abort", "preempt", "fail"])
def test_a_wait_ends_with_whoever_was_waited_for(ending: str) -> None:
    scheduler = make_scheduler(500, budget=10)
    first = add(scheduler, "first", [2] * 200)
    second = add(scheduler, "second", [2] * 201)
    for _ in range(3):
        assert [item.seq for item in step(scheduler)] == [first]
    assert first.num_computed_tokens == 30
    if ending == "abort":
        scheduler.abort("first")
    elif ending == "preempt":
        scheduler._preempt(first)
        scheduler.abort("first")
    else:
        batch = scheduler.schedule()
        scheduler.update(batch, [Sampled([], error="its logits are not finite") for _ in batch])
    assert [item.seq for item in step(scheduler)] == [second]
    assert second.num_cached_tokens == (0 if ending == "fail" else 30)
    run(scheduler)


def test_who_waits_for_room_is_looked_up_again_only_once_there_may_be_some() -> None:
    scheduler = make_scheduler(100, budget=100)
    add(scheduler, "small", [3] * 20, max_tokens=30)
    add(scheduler, "large", [4] * 40, max_tokens=20)
    step(scheduler)
    waiting = add(scheduler, "waits", [5] * 45)
    step(scheduler)
    num_lookups = scheduler.kv.num_lookups
    while len(scheduler.running) == 2:
        assert waiting not in [item.seq for item in step(scheduler)]
        assert scheduler.kv.num_lookups == num_lookups
    assert waiting in [item.seq for item in step(scheduler)]
    assert scheduler.kv.num_lookups == num_lookups + 1


def test_a_prefix_that_was_evicted_while_its_request_waited_for_room_is_not_used() -> None:
    scheduler = make_scheduler(100, budget=100)
    add(scheduler, "cached", [5] * 40)
    run(scheduler)
    add(scheduler, "large", [4] * 50, max_tokens=40)
    step(scheduler)
    waiting = add(scheduler, "waits", [*[5] * 40, *[6] * 10])
    for _ in range(15):
        step(scheduler)
    assert not waiting.block_table
    assert scheduler._refusal is not None
    assert scheduler._refusal.seq is waiting
    run(scheduler)
    assert waiting.num_cached_tokens < 40


@pytest.mark.parametrize("num_blocks", [12, 15, 20])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_remembered_of_a_refusal_changes_no_step(num_blocks: int, seed: int) -> None:
    """Random prompts with common beginnings come, end and are aborted: step by step, the same ones run."""
    rng = random.Random(1000 * num_blocks + seed)
    options = {"block_size": 4, "budget": 16, "max_num_seqs": 6, "max_model_len": 48}
    schedulers = [make_scheduler(num_blocks, kind=kind, **options) for kind in (Scheduler, ForgetfulScheduler)]
    alive: list[str] = []
    for number in range(3000):
        kind = rng.random()
        if kind < 0.2 and len(alive) < 20:
            beginning = [[1] * 12, [1] * 8 + [2] * 12, [3] * 17][rng.randrange(3)][: rng.randrange(1, 21)]
            prompt = beginning + [rng.randrange(5) for _ in range(rng.randrange(12))]
            alive.append(f"r{number}")
            num_tokens = rng.randrange(1, 16)
            for scheduler in schedulers:
                add(scheduler, alive[-1], prompt, max_tokens=num_tokens)
        elif kind < 0.24 and alive:
            victim = alive.pop(rng.randrange(len(alive)))
            for scheduler in schedulers:
                scheduler.abort(victim)
        else:
            batches = [step(scheduler) for scheduler in schedulers]
            steps = [[(item.seq.request.request_id, item.num_new_tokens) for item in batch] for batch in batches]
            assert steps[0] == steps[1]
            alive = [name for name in alive if name in schedulers[0]._by_id]
    assert schedulers[0].kv.num_lookups < schedulers[1].kv.num_lookups
