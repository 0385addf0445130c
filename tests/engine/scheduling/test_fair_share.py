"""Fair shares among tenants: nobody's TTFT, tokens or memory are another's to take. In a world without tensors."""

import random
import time

import pytest

from engine.scheduling.fair_share import SECONDS_OF_PRIORITY, FairShare
from engine.scheduling.request_queue import WaitingQueue
from engine.types import Scheduled, Sequence
from tests.support.scheduler_world import VOCAB_SIZE, World, make_world, plain_request


def make_busy_world(num_prompts: int, prompt: int, output: int = 20, *, tenant: str = "hog", **options: int) -> World:
    """One tenant's prompts, in a world that computes 32 tokens a step and runs 8 sequences."""
    settings = {"num_blocks": 400, "budget": 32, "max_num_seqs": 8, "max_model_len": 400} | options
    world = make_world(**settings)
    world.with_drafts = False
    rng = random.Random(0)
    for i in range(num_prompts):
        text = [rng.randrange(VOCAB_SIZE) for _ in range(prompt)]
        world.add(plain_request(f"{tenant}{i}", text, output, tenant=tenant))
    return world


def steps_to_first_token(world: World, seq: Sequence) -> int:
    for number in range(1, 10_000):
        world.step()
        world.check()
        if seq.num_output_tokens:
            return number
    raise AssertionError("no first token came")


@pytest.mark.parametrize(("prompt", "output"), [(300, 20), (20, 300)])
def test_a_hundred_requests_of_one_tenant_keep_another_no_longer_than_a_fair_share_would(prompt, output):
    alone = make_busy_world(0, 0)
    needed = steps_to_first_token(alone, alone.add(plain_request("quiet", [1, 2, 3] * 50, 5, tenant="quiet")))
    world = make_busy_world(100, prompt, output)
    for _ in range(40):
        world.step()
    budget = sum(item.num_new_tokens for item in world.last_batch)
    assert len(world.scheduler.running) == 8 or budget == 32, "the hog has every seat, or all of each step"
    taken = steps_to_first_token(world, world.add(plain_request("quiet", [1, 2, 3] * 50, 5, tenant="quiet")))
    assert taken <= 2 * needed + 3, "half of each step is the quiet tenant's, and a seat from the second step on"
    world.run()
    assert all(times == 1 for times in world.finished.values())


def test_among_the_requests_of_one_tenant_nothing_changes():
    order = []
    for tenant in ("", "only"):
        world = make_busy_world(20, 60, tenant=tenant)
        finished = []
        while world.scheduler.has_work:
            finished += [output.request_id.removeprefix(tenant) for output in world.step() if output.finish_reason]
        assert world.scheduler.num_preemptions == 0
        order.append(finished)
    assert order[0] == order[1]


def test_tenants_that_are_always_busy_are_served_equally_however_they_cut_their_requests():
    world = make_world(num_blocks=400, budget=16, max_num_seqs=8, max_model_len=300)
    world.with_drafts = False
    shapes = {"long prompts": (120, 2), "long answers": (3, 80), "short": (6, 4)}
    rng, number = random.Random(1), 0
    served = dict.fromkeys(shapes, 0)
    for step in range(6000):
        for tenant, (prompt, output) in shapes.items():
            mine = sum(seq.request.tenant == tenant for seq in world.scheduler._by_id.values())
            for _ in range(12 - mine):
                number += 1
                text = [rng.randrange(VOCAB_SIZE) for _ in range(prompt)]
                world.add(plain_request(f"{number}", text, output, tenant=tenant))
        world.step()
        if step >= 500:
            for item in world.last_batch:
                served[item.seq.request.tenant] += item.num_new_tokens + item.samples
    assert max(served.values()) < 1.15 * min(served.values()), served


def test_a_tenant_of_twice_the_weight_gets_twice_as_much():
    world = make_world(num_blocks=400, budget=16, max_num_seqs=8, max_model_len=300)
    world.with_drafts = False
    rng, number = random.Random(1), 0
    weights = {"heavy": 2.0, "light": 1.0}
    served = dict.fromkeys(weights, 0)
    for step in range(4000):
        for tenant, weight in weights.items():
            mine = sum(seq.request.tenant == tenant for seq in world.scheduler._by_id.values())
            for _ in range(12 - mine):
                number += 1
                text = [rng.randrange(VOCAB_SIZE) for _ in range(60)]
                world.add(plain_request(f"{number}", text, 10, tenant=tenant, tenant_weight=weight))
        world.step()
        if step >= 500:
            for item in world.last_batch:
                served[item.seq.request.tenant] += item.num_new_tokens + item.samples
    assert 1.8 < served["heavy"] / served["light"] < 2.2, served


def test_a_pause_saves_up_nothing():
    share = FairShare()
    busy, returning = sequence("a", "busy"), sequence("b", "returning")
    share.add(busy)
    share.add(returning)
    share.remove(returning)
    for _ in range(100):
        share.charge([Scheduled(busy, 1000, 0, False)])
    share.add(returning)
    assert share.served("returning") == share.served("busy") == 100_000
    share.remove(busy)
    share.remove(returning)
    share.add(busy)
    assert share.served("busy") == 100_000, "nor does leaving together forget what was served before"


def test_what_one_was_served_beyond_its_share_is_remembered_while_others_are_busy():
    share = FairShare()
    busy, greedy = sequence("a", "busy"), sequence("b", "greedy")
    share.add(busy)
    share.add(greedy)
    share.charge([Scheduled(greedy, 5000, 0, False)])
    share.remove(greedy)
    share.add(greedy)
    assert (share.served("greedy"), share.served("busy")) == (5000, 0), "a request at a time is no way around it"


def test_the_newest_sequence_of_who_holds_most_makes_room_once():
    world = make_busy_world(12, 8, 150)
    for _ in range(30):
        world.step()
    hogs = list(world.scheduler.running)
    assert len(hogs) == 8
    quiet = [world.add(plain_request(f"q{i}", [i % VOCAB_SIZE] * 8, 200, tenant="quiet")) for i in range(8)]
    for _ in range(60):
        world.step()
        world.check()
    held = [seq.request.tenant for seq in world.scheduler.running]
    assert held.count("quiet") >= 4, "half of the seats"
    assert all(seq.num_preemptions <= 1 for seq in [*hogs, *quiet])
    assert all(seq.num_preemptions == 0 for seq in quiet)
    world.run()
    assert {len(world.outputs[f"hog{i}"]) for i in range(12)} == {150}


def test_memory_is_shared_as_well_as_seats():
    """One tenant's few sequences own all blocks; another's request comes in all the same."""
    world = make_busy_world(4, 280, 110, num_blocks=330, max_model_len=400)
    for _ in range(60):
        world.step()
    assert world.kv.pool.num_free < 75, "too few for another prompt"
    taken = steps_to_first_token(world, world.add(plain_request("quiet", [1] * 300, 5, tenant="quiet")))
    assert taken < 40
    world.run()
    assert all(times == 1 for times in world.finished.values())


def test_a_request_larger_than_a_share_ends_beside_one_that_never_stops():
    world = make_world(num_blocks=60, budget=16, max_num_seqs=4, max_model_len=200)
    world.with_drafts = False
    large = world.add(plain_request("large", [1, 2] * 80, 30, tenant="large"))
    for number in range(3000):
        while sum(seq.request.tenant == "small" for seq in world.scheduler._by_id.values()) < 6:
            world.add(plain_request(f"s{number}-{random.random()}", [3] * 30, 20, tenant="small"))
        world.step()
        world.check()
        if large.finish_reason:
            return
    raise AssertionError("it starves")


def test_priority_comes_before_shares_and_waiting_makes_up_for_it():
    share = FairShare()
    queue = WaitingQueue(share)
    now = time.monotonic()
    ordinary = sequence("a", "a", arrival=1, added_at=now)
    patient = sequence("b", "b", priority=3, arrival=2, added_at=now)
    for seq in (ordinary, patient):
        share.add(seq)
        queue.push(seq)
    share.charge([Scheduled(ordinary, 10, 0, False)])
    assert queue.first is ordinary
    patient.added_at -= 3 * SECONDS_OF_PRIORITY  # it has waited so long: then the counts decide
    assert queue.first is patient


@pytest.mark.parametrize(("weight", "seats"), [(0.05, 7), (0.5, 5)])
def test_a_background_tenant_has_what_nobody_wants_and_gives_it_back(weight, seats):
    """Batches: low priority, a small share. A request of another comes at once, whatever runs, and all end."""
    world = make_busy_world(0, 0)
    rng = random.Random(1)
    background = []
    for number in range(40):
        text = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
        request = plain_request(f"line{number}", text, 60, tenant="batch", priority=100, tenant_weight=weight)
        background.append(world.add(request))
    for _ in range(40):
        world.step()
    assert len(world.scheduler.running) == 8, "alone it has every seat"
    for number in range(seats):  # that are the other's by its weight
        somebody = world.add(plain_request(f"somebody{number}", [1, 2, 3] * 5, 40, tenant="somebody"))
        assert steps_to_first_token(world, somebody) <= 3
    held = [seq.request.tenant for seq in world.scheduler.running]
    assert held.count("somebody") == seats
    assert held.count("batch") == 8 - seats, "what is left is used"
    world.run()
    assert all(seq.num_preemptions <= 1 for seq in background)
    assert all(times == 1 for times in world.finished.values())


def test_within_a_tenant_a_lower_priority_waits_for_those_that_come_soon_after_and_not_for_ever():
    queue = WaitingQueue(FairShare())
    low = sequence("low", "a", priority=1, arrival=1)
    soon = sequence("soon", "a", arrival=2, added_at=SECONDS_OF_PRIORITY - 1)
    later = sequence("later", "a", arrival=3, added_at=SECONDS_OF_PRIORITY + 1)
    for seq in (low, soon, later):
        queue.push(seq)
    assert [queue.pop() for _ in range(len(queue))] == [soon, low, later]


def sequence(name: str, tenant: str, *, priority: int = 0, arrival: int = 0, added_at: float = 0.0) -> Sequence:
    request = plain_request(name, [1], 1, tenant=tenant, priority=priority)
    return Sequence(request, [1], arrival=arrival, added_at=added_at)
