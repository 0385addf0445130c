"""Chunks of prompts that follow a target for the wait between tokens, on a machine that takes what a formula says."""

import random
from itertools import pairwise

import numpy as np
import pytest

from engine.scheduling.foresight import foresee
from engine.scheduling.prompt_pacing import LEAST_TOKENS, PromptPacing
from engine.scheduling.step_work import StepWork
from tests.support.paced_world import PacedRun, make_times, true_seconds
from tests.support.scheduler_world import VOCAB_SIZE, make_world, plain_request, random_request, reference_output

LONG = 6000


def make_run(target: float | None, *, num_streams: int, budget: int = 128, max_tokens: int = 400) -> PacedRun:
    """A world in which so many stream, each with its first token."""
    world = make_world(num_blocks=8000, budget=budget, max_num_seqs=64, max_model_len=LONG + 500)
    world.with_drafts = False
    pacing = None if target is None else PromptPacing(make_times(), target=target)
    run = PacedRun(world, pacing)
    for index in range(num_streams):
        world.add(plain_request(f"stream {index}", [index % VOCAB_SIZE, index // VOCAB_SIZE, 1, 2], max_tokens))
    while len(world.scheduler.waiting) or any(seq.num_output_tokens == 0 for seq in world.scheduler.running):
        run.step()
    if num_streams:
        run.step()
    return run


def wait_p99_with_a_long_prompt(target: float | None) -> tuple[float, float, int]:
    """(p99 of the waits without it, and while it is read, in how many steps)"""
    run = make_run(target, num_streams=16, max_tokens=2500)
    for _ in range(150):
        run.step()
    alone = float(np.percentile(run.waits[-100:], 99))
    long = run.world.add(plain_request("long", [3] * LONG, 1))
    first = len(run.waits)
    while not long.finish_reason:
        run.step()
    return alone, float(np.percentile(run.waits[first:], 99)), len(run.waits) - first


def test_a_prompt_of_6000_tokens_amid_16_streams_moves_their_waits_less_than_twofold() -> None:
    alone, beside, num_steps = wait_p99_with_a_long_prompt(target=0.075)
    assert beside < 0.075 * 1.05
    assert beside < 2 * alone
    assert num_steps < LONG / 6  # more than the least
    untargeted = wait_p99_with_a_long_prompt(target=None)[1]
    assert untargeted > 5 * alone  # what it is without


def test_chunks_get_shorter_as_the_prompt_gets_long_and_never_too_short_to_go_on() -> None:
    run = make_run(0.075, num_streams=16, max_tokens=2500)
    long = run.world.add(plain_request("long", [3] * LONG, 1))
    first = len(run.chunks)
    while not long.finish_reason:
        run.step()
    chunks = run.chunks[first:-1]
    assert np.mean(chunks[:20]) > 1.5 * np.mean(chunks[-20:])
    assert min(chunks) >= LEAST_TOKENS
    assert sum(chunks) + run.chunks[-1] == LONG


@pytest.mark.parametrize("target", [0.001, 0.075])
def test_where_nobody_streams_a_prompt_gets_the_whole_budget(target: float) -> None:
    run = make_run(target, num_streams=0)
    run.world.add(plain_request("long", [3] * LONG, 1))
    while run.world.scheduler.has_work:
        run.step()
    assert run.chunks == [128] * (LONG // 128) + [LONG % 128]
    assert run.world.scheduler.prompt_limit == ""


@pytest.mark.parametrize("num_streams", [1, 16, 60])
def test_a_target_that_cannot_be_met_leaves_prompts_their_least_share(num_streams: int) -> None:
    """A quarter of the streams' own time, or a few tokens where that is not enough for any."""
    run = make_run(0.001, num_streams=num_streams)
    alone = run.waits[-1]
    long = run.world.add(plain_request("long", [3] * 600, 1))
    first, waits = len(run.chunks), len(run.waits)
    while not long.finish_reason:
        run.step()
        assert run.world.scheduler.prompt_limit in ("least", "none")  # none: its last chunk
    assert min(run.chunks[first:-1]) >= LEAST_TOKENS
    few = 0.0024 * LEAST_TOKENS + 3e-7 * LEAST_TOKENS * 600
    assert max(run.waits[waits:]) < 1.1 * max(1.25 * alone, alone + few) + 0.005


def test_a_generous_target_gives_prompts_the_whole_budget() -> None:
    run = make_run(60.0, num_streams=16)
    run.world.add(plain_request("long", [3] * 1000, 1))
    run.step()
    assert run.chunks[-1] == 128 - 16
    assert run.world.scheduler.prompt_limit == "none"


def test_several_prompts_share_what_a_step_has_room_for_and_none_gets_in_twice() -> None:
    run = make_run(0.075, num_streams=8)
    for index in range(6):
        run.world.add(plain_request(f"prompt {index}", [index % VOCAB_SIZE] * 9 + [4] * 20, 1))
    waits = len(run.waits)
    while len(run.world.scheduler.running) > 8 or len(run.world.scheduler.waiting):
        run.step()
        run.world.check()
    assert all(wait < 0.08 for wait in run.waits[waits:])
    assert max(run.chunks) > 29  # of more than one prompt


def test_a_cached_prefix_is_counted_as_context_from_the_first_chunk_on() -> None:
    """Its tokens are not computed, but each of the others attends to them."""
    run = make_run(0.075, num_streams=16, max_tokens=2500)
    run.world.add(plain_request("first", [3] * 5000, 1))
    while len(run.world.scheduler.running) > 16 or len(run.world.scheduler.waiting):
        run.step()
    waits = len(run.waits)
    run.world.add(plain_request("second", [3] * 5000 + [1] * 300, 1))
    while len(run.world.scheduler.running) > 16 or len(run.world.scheduler.waiting):
        run.step()
    assert len(run.waits) > waits
    assert max(run.waits[waits:]) < 0.075 * 1.1


def test_what_was_foreseen_is_scheduled_whatever_was_learned_meanwhile() -> None:
    """A step that was launched with another chunk would have been for nothing."""
    run = make_run(0.075, num_streams=8)
    scheduler = run.world.scheduler
    run.world.add(plain_request("long", [3] * 2000, 1))
    for number in range(20):
        run.step()
        batch = scheduler.schedule()
        plan = foresee(scheduler, batch)
        assert plan is not None
        foreseen = {item.seq.request.request_id: item.num_new_tokens for item in plan}
        for item in batch:
            run.world.outputs[item.seq.request.request_id] += []
        scheduler.update(batch, [run.world._run(item) for item in batch])
        for _ in range(20):  # the machine gets faster and slower
            slow = StepWork(40, 10, 400, 400, [])
            run.pacing.times.learn(slow, true_seconds(slow) * (3.0 if number % 2 else 0.3))
        assert {item.seq.request.request_id: item.num_new_tokens for item in scheduler.schedule()} == foreseen


@pytest.mark.parametrize("target", [0.001, 0.03, 0.06])
@pytest.mark.parametrize(("num_blocks", "tenants"), [(18, ("",)), (18, ("a", "b")), (60, ("",))])
def test_random_operations_with_a_target_change_no_output(target: float, num_blocks: int, tenants) -> None:
    """Preemption, drafts, aborts, scored prompts and shared prefixes, on a machine of changing speed."""
    world = make_world(num_blocks=num_blocks, seed=num_blocks)
    run = PacedRun(world, PromptPacing(make_times(), target=target))
    rng, alive, requests = world.rng, set(), {}
    speeds = random.Random(1)
    run.seconds_of = lambda work: true_seconds(work) * speeds.choice([0.5, 1, 2])
    for operation in range(3000):
        kind = rng.random()
        if kind < 0.12 and len(alive) < 30:
            requests[f"r{operation}"] = random_request(rng, f"r{operation}", max_prompt=40, tenants=tenants)
            world.add(requests[f"r{operation}"])
            alive.add(f"r{operation}")
        elif kind < 0.15 and alive:
            victim = rng.choice(sorted(alive))
            world.scheduler.abort(victim)
            alive.remove(victim)
        else:
            before = dict(world.finished)
            run.step()
            alive -= {name for name, times in world.finished.items() if times and not before.get(name)}
        world.check()
    world.run()
    for name, times in world.finished.items():
        if times:
            assert world.outputs[name] == reference_output(requests[name], 64)


def test_a_longer_wait_that_is_allowed_makes_longer_chunks() -> None:
    firsts = []
    for target in (0.06, 0.08, 0.1, 0.15):
        run = make_run(target, num_streams=8)
        run.world.add(plain_request("long", [3] * LONG, 1))
        run.step()
        firsts.append(run.chunks[-1])
    assert all(shorter < longer for shorter, longer in pairwise(firsts))
