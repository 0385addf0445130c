"""Scheduler and KV manager together, in a world without tensors."""

import itertools
import random

import msgspec
import pytest

from engine.kv_cache.block_pool import NULL_BLOCK
from engine.kv_cache.groups import KVCacheGroup
from engine.kv_cache.manager import KVCacheManager
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.types import Request, Sampled, SamplingParams, Sequence, StepOutput
from tests.support.scheduler_world import (
    VOCAB_SIZE,
    World,
    make_world,
    plain_request,
    random_request,
    reference_output,
)


@pytest.mark.parametrize(
    ("num_blocks", "windows", "min_prompt_share", "max_num_logits", "tenants"),
    [
        (18, [None], 2, None, ("",)),
        (18, [None], 2, None, ("a", "b", "c")),
        (18, [10], None, 8, ("",)),
        (40, [None], None, 8, ("",)),
        (40, [None], 1, 8, ("a", "b")),
        (40, [10], 1, 11, ("",)),
        (32, [None, 10], None, None, ("",)),
        (32, [None, 10], None, None, ("a", "a", "a", "b")),
        (60, [3, None, 12], 1, 8, ("",)),
    ],
)
def test_random_operations_keep_every_invariant(num_blocks, windows, min_prompt_share, max_num_logits, tenants):
    """Add, step, abort and crash-replay in random order: 25,000 operations for each of these worlds."""
    options = {"windows": windows, "min_prompt_share": min_prompt_share, "max_num_logits": max_num_logits}
    world = make_world(num_blocks=num_blocks, seed=num_blocks, **options)
    rng, alive, requests, num_aborted = world.rng, set(), {}, 0
    for operation in range(25_000):
        kind = rng.random()
        if kind < 0.12 and len(alive) < 30:
            request = random_request(rng, f"r{operation}", max_prompt=40, tenants=tenants)
            if rng.random() < 0.1:  # as after a crash: some of its output is known
                known = reference_output(request, 64)[:-1]
                request = msgspec.structs.replace(request, output_token_ids=known[: rng.randrange(len(known) + 1)])
            requests[request.request_id] = request
            world.add(request)
            alive.add(request.request_id)
        elif kind < 0.15 and alive:
            victim = rng.choice(sorted(alive))
            assert world.scheduler.abort(victim) is not None
            alive.remove(victim)
            num_aborted += 1
        else:
            alive -= {output.request_id for output in world.step() if output.finish_reason}
        world.check()
    world.run()
    assert world.kv.pool.num_owned == 0
    for request_id, times in world.finished.items():
        if times:
            assert times == 1
            assert world.outputs[request_id] == reference_output(requests[request_id], 64)
            if requests[request_id].params.prompt_logprobs is not None:
                assert world.num_scored[request_id] == len(requests[request_id].prompt_token_ids) - 1
    assert sum(world.finished.values()) + num_aborted == len(requests)
    bounded = windows[0] is not None  # a window bounds what a sequence needs
    assert world.scheduler.num_preemptions > 0 or num_blocks == 40 or bounded
    assert world.scheduler.num_prefix_hits > 0


def test_a_request_is_preempted_at_most_logarithmically_often():
    world = make_world(num_blocks=40, max_model_len=140, budget=16)
    seqs = [world.add(plain_request(f"r{i}", [i % VOCAB_SIZE, i // VOCAB_SIZE], 120)) for i in range(12)]
    world.run()
    assert 0 < max(seq.num_preemptions for seq in seqs) <= 5  # headroom 8, 16, ... reaches 120 after four doublings


@pytest.mark.parametrize("seed", range(60))
def test_windows_and_groups_of_any_size_share_prefixes_and_never_run_out_of_room(seed):
    """Long shared prompts, small caches, random windows: what is admitted has room, and what is found is right."""
    rng = random.Random(seed)
    size, budget = rng.choice([1, 2, 4]), rng.choice([4, 8, 16])
    windows = rng.choice([[rng.randrange(1, 30)], [None, rng.randrange(1, 30)], [rng.randrange(1, 30), 5, None, 64]])
    num_blocks = KVCacheManager(2, size, windows=windows).num_blocks_at_most(64, budget + 2 * size)
    num_blocks += rng.randrange(2, 40)
    max_num_seqs = min(budget, rng.randrange(1, 6))
    world = make_world(
        num_blocks=num_blocks, block_size=size, budget=budget, windows=windows, max_num_seqs=max_num_seqs, seed=seed
    )
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(45)]
    requests = {}
    for i in range(12):
        prompt = shared[: rng.randrange(1, 46)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(6))]
        requests[str(i)] = plain_request(str(i), prompt, rng.randrange(1, 12))
        world.add(requests[str(i)])
        for _ in range(rng.randrange(4)):
            world.step()
            world.check()
    world.run()
    assert world.outputs == {name: reference_output(request, 64) for name, request in requests.items()}


def test_a_prefix_behind_a_window_is_found_by_its_end():
    world = make_world(num_blocks=34, windows=[8], max_model_len=200, budget=16)
    shared = [i % VOCAB_SIZE for i in range(100)]
    world.add(plain_request("a", [*shared, 1], 3))
    world.run()
    assert world.kv.pool.num_cached_free > 20
    world.add(plain_request("b", [*shared, 2], 3))
    world.step()
    assert world.scheduler.num_prefix_hits == 100
    (seq,) = world.scheduler.running
    assert seq.num_released_blocks == [23]  # of 25; the 100th token sees eight, two blocks of four and itself
    world.check()
    world.run()
    assert world.outputs["b"] == reference_output(plain_request("b", [*shared, 2], 3), 200)


def test_a_prefix_is_as_long_as_every_group_has_it():
    """A window finds its prefix by the end, full attention by the beginning; both must have it."""
    world = make_world(num_blocks=400, windows=[None, 8], max_model_len=200, budget=16)
    shared = [i % VOCAB_SIZE for i in range(100)]
    world.add(plain_request("a", [*shared, 1], 3))
    world.run()
    kv, digests = world.kv, world.kv.hashes(Sequence(plain_request("", shared, 1), shared), 25)
    full, window = kv.groups

    def found(*forgotten: tuple[KVCacheGroup, int]) -> int:
        """Blocks of the prefix that a new request finds without these."""
        known = [(group.key(digests[i]), kv.pool.lookup(group.key(digests[i]))) for group, i in forgotten]
        for key, _ in known:
            kv.pool.uncache(key)
        prefix = kv.find_prefix(Sequence(plain_request("", [*shared, 2], 1), [*shared, 2]))
        for key, block in known:
            kv.pool.cache(block, key)
        assert {len(blocks) for blocks in prefix} == {len(prefix[0])}
        assert all(len(blocks) - blocks.count(NULL_BLOCK) <= 3 for blocks in prefix[1:])
        return len(prefix[0])

    assert found() == 25
    assert found((full, 10)) == 10
    assert found((window, 24)) == 24  # the token behind block 23 sees blocks 22 and 23
    assert found((window, 23)) == 23
    assert found((window, 5)) == 25  # behind the window of the token that comes next
    assert found((full, 10), (window, 9), (window, 7)) == 7
    assert found((full, 0)) == 0


def test_groups_with_windows_give_their_blocks_back_while_full_ones_keep_theirs():
    """A text of 400 tokens in three groups, two with a window of 16: the same tokens with two fifths of the blocks."""
    held = {}
    for windows in ([None, None, None], [None, 16, 16]):
        world = make_world(num_blocks=400, windows=windows, max_model_len=410, budget=16)
        world.with_drafts = False
        world.add(plain_request("a", [i % VOCAB_SIZE for i in range(300)], 100))
        most = 0
        while world.scheduler.has_work:
            world.step()
            world.check()
            most = max(most, world.kv.pool.num_owned)
        assert world.outputs["a"] == reference_output(
            plain_request("a", [i % VOCAB_SIZE for i in range(300)], 100), 410
        )
        held[windows[1]] = most
    assert held[None] == 3 * 100
    assert held[16] <= 100 + 2 * (16 + 16 + 8) // 4


def test_room_is_counted_over_all_groups():
    """One request at its longest: 50 blocks of full attention, and 8 of a window of 8, a step of 16 and two blocks."""
    assert make_world(num_blocks=1 + 58, windows=[None, 8], max_model_len=200).kv.num_groups == 2
    with pytest.raises(ValueError, match=r"needs 58 KV blocks .* not 57; lower model.max_model_len to 196"):
        make_world(num_blocks=1 + 57, windows=[None, 8], max_model_len=200)


def test_a_window_that_does_not_fit_into_the_cache_is_refused():
    with pytest.raises(ValueError, match=r"window of 50 and a step of 16.*raise kv_cache.memory"):
        make_world(num_blocks=10, windows=[50], max_model_len=1000)


def test_drafts_preempt_nobody():
    num_close = 0
    for seed in range(20):
        limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=48, headroom=1)
        world = World(Scheduler(KVCacheManager(14, 4), limits), random.Random(seed))
        for i in range(8):
            world.add(plain_request(str(i), [i % VOCAB_SIZE] * (2 + i % 3), 20))
        while world.scheduler.has_work:
            lacking = sum(
                max(world.kv.num_blocks_for(seq.num_tokens) - len(seq.block_table), 0)
                for seq in world.scheduler.running
            )
            num_free, num_preemptions = world.kv.pool.num_free, world.scheduler.num_preemptions
            world.step()
            world.check()
            if lacking <= num_free:
                assert world.scheduler.num_preemptions == num_preemptions, "there was room for all but drafts"
                num_close += num_free < 4
    assert num_close > 100


def test_blocks_that_were_lent_to_drafts_are_given_back_before_anybody_is_preempted():
    """Also a step later, when the drafts were wrong and their blocks stand empty in a table."""
    num_preemptions = 0
    for seed in range(40):
        limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=28, headroom=1)
        world = World(Scheduler(KVCacheManager(30, 1, prefix_caching=False), limits), random.Random(seed))
        for i in range(8):
            world.add(plain_request(str(i), [i % VOCAB_SIZE] * (2 + i % 3), 20))
        while world.scheduler.has_work:
            needed = sum(world.kv.num_blocks_for(seq.num_tokens) for seq in world.scheduler.running)
            before = world.scheduler.num_preemptions
            world.step()
            world.check()
            if needed <= world.kv.pool.num_blocks:
                assert world.scheduler.num_preemptions == before, "there was room for every token that is no guess"
        num_preemptions += world.scheduler.num_preemptions
    assert num_preemptions > 0


@pytest.mark.parametrize("num_lookahead_tokens", [0, 1, 3, 9])
def test_the_smallest_cache_that_a_window_is_accepted_with_serves_the_longest_prompt(num_lookahead_tokens):
    for size, window, budget in itertools.product([1, 2, 4], [1, 7, 30], [4, 16]):
        limits = SchedulerLimits(
            max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=100, num_lookahead_tokens=num_lookahead_tokens
        )
        world = World(_smallest_scheduler(limits, size, window), random.Random(0))
        world.add(plain_request("long", [i % VOCAB_SIZE for i in range(90)], 8))
        world.run()
        assert world.finished["long"] == 1


def _smallest_scheduler(limits: SchedulerLimits, block_size: int, window: int) -> Scheduler:
    for num_blocks in itertools.count(2):
        try:
            return Scheduler(KVCacheManager(num_blocks, block_size, windows=[window]), limits)
        except ValueError:
            continue
    raise AssertionError("unreachable")


def test_a_request_that_fails_takes_what_it_committed_out_of_the_prefix_cache():
    world = make_world(budget=8)
    prompt = [1, 2, 3, 4] * 6
    world.add(plain_request("a", prompt, 5))
    world.step()
    world.step()
    assert world.kv.pool.block_of  # of its first chunks
    batch = world.scheduler.schedule()
    world.scheduler.update(batch, [Sampled([], error="its logits are not finite") for _ in batch])
    assert not world.kv.pool.block_of
    world.last_batch = []
    world.check()
    world.add(plain_request("b", prompt, 5))
    world.run()
    assert world.scheduler.num_prefix_hits == 0


def test_a_request_that_fails_takes_what_it_computed_before_it_was_preempted_out_too():
    world = make_world(budget=4, max_num_seqs=4)
    prompt = [1, 2, 3, 4] * 6
    seq = world.add(plain_request("a", prompt, 5))
    for _ in range(4):
        world.step()
    world.scheduler._preempt(seq)
    first = world.kv.pool.lookup(world.kv.hashes(seq, 1)[0])
    world.kv.pool.uncache(world.kv.hashes(seq, 1)[0])  # as another's need of a block would
    assert first is not None
    assert len(world.kv.pool.block_of) == 3
    batch = world.scheduler.schedule()
    world.scheduler.update(batch, [Sampled([], error="its logits are not finite") for _ in batch])
    assert not world.kv.pool.block_of


def test_equal_prompts_are_computed_once():
    world = make_world(num_blocks=100, budget=64)
    world.with_drafts = False
    prompt = [1, 2, 3, 4] * 8 + [0]
    for i in range(8):
        world.add(plain_request(f"r{i}", prompt, 1))
    num_computed = 0
    while world.scheduler.has_work:
        world.step()
        num_computed += sum(item.num_new_tokens for item in world.last_batch)
    assert num_computed == 33 + 7  # the prompt once, and the last token of each copy


def test_different_salts_share_nothing():
    world = make_world()
    for salt in ("a", "b"):
        request = plain_request(salt, [1, 2, 3, 4, 1, 2, 3, 4, 0], 1)
        world.add(msgspec.structs.replace(request, cache_salt=salt))
        world.run()
    assert world.scheduler.num_prefix_hits == 0


def test_decodes_run_in_every_step_while_a_long_prompt_is_read():
    world = make_world(num_blocks=200, budget=8, max_model_len=256)
    world.with_drafts = False
    world.add(plain_request("short", [1], 40))
    world.step()
    world.add(plain_request("long", [2] * 150, 1))
    for _ in range(20):
        assert [output.request_id for output in world.step()] == ["short"]
        assert sum(item.num_new_tokens for item in world.last_batch) == 8


@pytest.mark.parametrize(
    ("num_decoding", "num_prompt_tokens", "share"),
    [
        (0, 90, 40),
        (1, 90, 6),
        (2, 90, 6),
        (3, 90, 9),
        (8, 90, 24),
        (1, 160, 10),
        (3, 160, 10),
        (4, 160, 12),
        (1, 990, 39),
    ],
)
def test_prompts_get_a_share_that_grows_with_the_streams_beside_them_and_with_their_length(
    num_decoding, num_prompt_tokens, share
):
    world = make_world(num_blocks=400, budget=40, max_num_seqs=9, max_model_len=1100, min_prompt_share=6)
    world.with_drafts = False
    for index in range(num_decoding):
        world.add(plain_request(f"stream {index}", [index % VOCAB_SIZE, index // VOCAB_SIZE], 40))
    while any(seq.num_output_tokens == 0 for seq in world.scheduler.running) or len(world.scheduler.waiting):
        world.step()
    world.add(plain_request("long", [2] * num_prompt_tokens, 1))
    for _ in range(2):
        outputs = world.step()
        assert len(outputs) == num_decoding  # each stream goes on
        assert sum(item.num_new_tokens for item in world.last_batch) == num_decoding + share


@pytest.mark.parametrize("max_num_logits", [32, 40, 256])
def test_however_many_prompts_are_scored_a_step_has_the_rows_that_were_planned(max_num_logits):
    """The first in order of service get what is left when each of the others has a row."""
    world = make_world(num_blocks=2000, budget=8192, max_num_seqs=32, max_model_len=300, max_num_logits=max_num_logits)
    for index in range(32):
        params = SamplingParams(seed=0, max_tokens=3, prompt_logprobs=2)
        prompt = [index % VOCAB_SIZE] * (50 + index)
        world.add(Request(request_id=f"r{index}", prompt_token_ids=prompt, params=params))
    most = 0
    while world.scheduler.has_work:
        world.step()
        world.check()
        most = max(most, sum(item.num_logits for item in world.last_batch))
    assert most == max_num_logits
    assert [world.num_scored[f"r{index}"] for index in range(32)] == [49 + index for index in range(32)]


def test_rows_are_shared_like_tokens_streams_first_and_nobody_waits_for_another_s_scores_or_drafts():
    world = make_world(num_blocks=400, budget=64, max_num_seqs=4, max_model_len=300, max_num_logits=8)
    world.with_drafts = False
    streams = [world.add(plain_request(f"stream {i}", [i], 40)) for i in range(2)]
    world.step()
    scored = SamplingParams(seed=0, max_tokens=3, prompt_logprobs=0)
    world.add(Request(request_id="scored", prompt_token_ids=[3] * 200, params=scored))
    world.add(plain_request("behind", [4] * 30, 9))
    world.step()
    assert {item.seq.request.request_id: item.num_logits for item in world.last_batch}["scored"] == 5
    for _ in range(3):
        for seq in streams:
            seq.draft_token_ids, seq.draft_parents = [4] * 4, [-1, 0, 1, 2]
        outputs = {output.request_id for output in world.step()}
        world.check()
        rows = {item.seq.request.request_id: item.num_logits for item in world.last_batch}
        assert outputs >= {"stream 0", "stream 1", "scored"}
        assert rows["stream 0"] == 5  # all of its drafts: the other three have a row each
        assert rows["behind"] == 1
        assert sum(rows.values()) == 8
    world.run()
    assert world.num_scored["scored"] == 199


def test_lower_priority_numbers_start_first():
    world = make_world(max_num_seqs=1)
    for request_id, priority in (("late", 5), ("soon", -1), ("middle", 0)):
        world.add(plain_request(request_id, [1], 1, priority=priority))
    order = []
    while world.scheduler.has_work:
        order += [output.request_id for output in world.step()]
    assert order == ["soon", "middle", "late"]


def test_a_sliding_window_frees_the_blocks_behind_it():
    world = make_world(num_blocks=12, windows=[8], max_model_len=1000, budget=8)
    world.add(plain_request("r", [1] * 300, 50))
    world.run()  # 350 tokens through 11 blocks of 4
    assert world.finished["r"] == 1


def test_impossible_requests_are_refused_when_they_arrive():
    world = make_world()
    with pytest.raises(ValueError, match=r"64 tokens, but max_model_len is 64"):
        world.add(plain_request("long", [1] * 64, 1))
    world.add(plain_request("longest that fits", [1] * 63, 5))
    with pytest.raises(ValueError, match="in use"):
        world.add(plain_request("longest that fits", [1], 1))
    world.run()
    assert len(world.outputs["longest that fits"]) == 1


def test_a_cache_that_cannot_hold_one_request_is_refused():
    make_world(num_blocks=17, max_model_len=64)
    with pytest.raises(ValueError, match=r"lower model\.max_model_len to 60"):
        make_world(num_blocks=16, max_model_len=64)


def test_a_failed_request_leaves_nothing_in_the_prefix_cache():
    world = make_world(budget=64)
    seq = world.add(plain_request("poison", [1] * 20, 5))
    batch = world.scheduler.schedule()
    [output] = world.scheduler.update(batch, [Sampled([], error="it failed")])
    assert (output.finish_reason, output.error) == ("error", "it failed")
    assert seq.finish_reason == "error"
    assert not world.kv.pool.hash_of
    assert world.kv.pool.num_owned == 0


def test_drafts_that_had_no_place_in_a_step_are_dropped_with_it():
    """They were guesses of what follows a token that is not the newest any more."""
    world = make_world(budget=8)
    world.with_drafts = False
    seqs = [world.add(plain_request(f"r{i}", [i], 9)) for i in range(6)]
    world.step()
    for seq in seqs:
        seq.draft_token_ids, seq.draft_parents = [4, 4], [-1, 0]
    world.step()
    assert sorted(item.num_drafts for item in world.last_batch) == [0, 0, 0, 0, 0, 2]
    assert all(not seq.draft_token_ids and not seq.draft_parents for seq in seqs)


def test_a_token_in_the_middle_of_an_answer_says_no_more_than_it_must():
    world = make_world()
    world.with_drafts = False
    world.add(plain_request("r", [1, 2, 3], 4))
    first, *middle, last = [output for _ in range(4) for output in world.step()]
    assert first.timing.num_prefill_chunks == last.timing.num_prefill_chunks == 1
    assert last.finish_reason == "length"
    assert [msgspec.structs.asdict(output) for output in middle] == [
        msgspec.structs.asdict(StepOutput(request_id="r", token_ids=output.token_ids)) for output in middle
    ]
    assert len(middle) == 2
