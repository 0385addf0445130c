"""Why a request was slow: the sentence names what took the time, and the numbers add up."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import msgspec
import pytest

from engine.types import RequestTiming, StepStats
from server.telemetry.explanation import Circumstances, Explanation, explain
from server.telemetry.flight_recorder import FlightRecorder, RecordedStep
from server.telemetry.request_timeline import Admitted, Ahead, RequestHistory, Timeline
from server.telemetry.token_counts import TokenCounts

CIRCUMSTANCES = Circumstances(max_num_seqs=16, block_size=16, prefix_caching=True)
NOBODY = Ahead()
T = 1000.0  # when the request of a test arrives


def timing(queued: float, prefill: float, decode: float = 0.0, **numbers: int) -> RequestTiming:
    known = {"num_prefill_chunks": 1, "num_preemptions": 0, "num_drafts": 0, "num_accepted_drafts": 0}
    return RequestTiming(queued=queued, prefill=prefill, decode=decode, **(known | numbers))


@dataclass
class Running:
    """A request that runs, as far as its timeline asks it."""

    prompt_token_ids: list[int]
    salt: str = ""
    name: str = "cmpl-1"
    first: RequestTiming | None = None
    last: RequestTiming | None = None
    output: TokenCounts = field(default_factory=TokenCounts)
    num_restarts: int = 0
    needs_all: str = ""
    choices_per_prompt, max_tokens = 1, 100

    def admitted(self, ahead: Ahead) -> Admitted:
        return Admitted(
            response_id=self.name, cache_salt=self.salt, num_prompt_tokens=len(self.prompt_token_ids), num_choices=1,
            ahead=ahead, needs_all=self.needs_all,
        )  # fmt: skip

    def counts(self) -> TokenCounts:
        return self.output

    def first_timing(self) -> RequestTiming | None:
        return self.first

    def engine_timing(self) -> RequestTiming | None:
        return self.last


def step(at: float, seconds: float, **changes: object) -> RecordedStep:
    values: dict[str, object] = {
        "num_tokens": 16, "num_seqs": 16, "num_running": 16, "num_waiting": 3, "schedule": 0.0, "forward": seconds,
        "sample": 0.0, "update": 0.0, "propose": 0.0, "num_blocks": 100, "num_owned_blocks": 40,
        "num_cached_blocks": 10, "num_preemptions": 0, "num_prefix_queries": 0, "num_prefix_hits": 0, "num_drafts": 0,
        "num_draft_tokens": 0, "accepted_by_position": [], "bytes_moved": 1, "flops": 1, "started_at": at,
    }  # fmt: skip
    return RecordedStep(StepStats(**(values | changes)), at + seconds)


class World:
    def __init__(self) -> None:
        self.history, self.recorder = RequestHistory(), FlightRecorder()

    def request(self, running: Running, ahead: Ahead = NOBODY, *, at: float = T) -> Timeline:
        timeline = Timeline(f"req-{running.name}", "", at)
        timeline.admit(running, ahead, at + 0.01)
        self.history.add(timeline)
        return timeline

    def steps(self, *steps: RecordedStep) -> None:
        self.recorder._steps.extend(steps)

    def explain(self, timeline: Timeline, *, now: float = T + 60, changes: dict | None = None) -> Explanation:
        circumstances = Circumstances(
            **({name: getattr(CIRCUMSTANCES, name) for name in CIRCUMSTANCES.__slots__} | (changes or {}))
        )
        return explain(timeline, self.history, self.recorder, circumstances, now)


def slow_request(world: World, **changes: object) -> Timeline:
    """2.31 s to the first token, 14 ahead of it, and 101 tokens in the five seconds after it."""
    prompt = [*range(5210)]
    counts = TokenCounts(num_prompt_tokens=5210, num_output_tokens=101)
    running = Running(prompt, first=timing(1.9, 0.36, num_prefill_chunks=3), last=timing(1.9, 0.36, 5.0), output=counts)
    for name, value in changes.items():
        setattr(running, name, value)
    timeline = world.request(running, Ahead(14, 82_000, 16))
    timeline.begin_answer(T + 2.31)
    return timeline


def test_the_sentence_says_what_took_the_time():
    world = World()
    timeline = slow_request(world)
    timeline.end("stop", 200, T + 7.31)
    explained = world.explain(timeline)
    assert explained.sentence == (
        "TTFT 2.31 s: 1.90 s queued behind 14 requests (82k tokens) while 16 requests ran, "
        "0.36 s prefill of 5,210 tokens in 3 steps (0 cached; no earlier prompt begins like it), "
        "40 ms from the engine to the answer; then 100 tokens in 5.00 s (50 ms each); "
        "ended after 7.31 s with 200 (stop)"
    )
    assert (explained.state, explained.outcome, explained.status) == ("ended", "stop", 200)
    assert explained.output.seconds_per_token == pytest.approx(0.05)


def test_the_parts_add_up():
    world = World()
    timeline = slow_request(world)
    timeline.end("stop", 200, T + 7.31)
    seconds = world.explain(timeline).seconds
    to_first = seconds.before_queue + seconds.queued + seconds.prefill + seconds.delivery
    assert to_first == pytest.approx(seconds.time_to_first_token)
    assert seconds.time_to_first_token + seconds.decode == pytest.approx(seconds.total)


def test_a_full_batch_and_a_full_cache_are_told_apart():
    world = World()
    timeline = slow_request(world)
    world.steps(step(T + 0.5, 0.1))
    assert "while 16 requests ran, as many as may (scheduler.max_num_seqs)" in world.explain(timeline).sentence
    world = World()
    timeline = slow_request(world)
    world.steps(step(T + 0.5, 0.1, num_running=7, num_owned_blocks=97))
    explained = world.explain(timeline)
    assert "while 7 requests ran, with 97% of the KV cache taken" in explained.sentence
    assert (explained.queue.max_requests_running, explained.queue.max_kv_cache_usage) == (7, 0.97)


def test_steps_outside_of_the_wait_say_nothing_of_it():
    world = World()
    timeline = slow_request(world)
    world.steps(step(T - 1, 0.1, num_running=9), step(T + 2.0, 0.1, num_running=8))
    assert world.explain(timeline).queue.max_requests_running == 0


def test_the_prefix_broke_where_the_closest_earlier_prompt_differs():
    world = World()
    world.request(Running([*range(100), 7, 7, 7], name="cmpl-a"), at=T - 9)
    world.request(Running([*range(212), *[5] * 300], name="cmpl-b"), at=T - 8)
    world.request(Running([9, *range(1, 500)], name="cmpl-c"), at=T - 7)
    timeline = slow_request(world, output=TokenCounts(num_prompt_tokens=5210, num_cached_tokens=208))
    explained = world.explain(timeline)
    assert "5,002 tokens" in explained.sentence
    assert "(208 cached; the prefix broke at token 212, until where cmpl-b is the same)" in explained.sentence
    assert (explained.prompt.shared_tokens, explained.prompt.shared_with) == (212, "cmpl-b")
    world.request(Running([*range(300)], name="cmpl-later"), at=T + 1)
    assert world.explain(timeline).prompt.shared_with == "cmpl-b", "it came later"


def test_what_was_cached_of_an_answer_is_no_broken_prefix():
    """The next turn of a chat begins with the last prompt and its answer, and only prompts are kept to be compared."""
    world = World()
    world.request(Running([*range(36), *[5] * 9], name="cmpl-a"), at=T - 9)
    timeline = slow_request(world, output=TokenCounts(num_prompt_tokens=5210, num_cached_tokens=80))
    assert "(80 cached)" in world.explain(timeline).sentence


def test_only_prompts_of_the_same_salt_are_compared():
    world = World()
    world.request(Running([*range(5210)], name="cmpl-other", salt="another tenant"), at=T - 9)
    explained = world.explain(slow_request(world))
    assert (explained.prompt.shared_tokens, explained.prompt.shared_with) == (0, None)
    assert "another" not in str(msgspec.json.encode(explained))


def test_what_was_evicted_switched_off_or_not_allowed_is_named():
    world = World()
    world.request(Running([*range(5210)], name="cmpl-a"), at=T - 9)
    timeline = slow_request(world)
    assert "cmpl-a begins with the same 5,210, which are no longer cached" in world.explain(timeline).sentence
    assert "prefix_caching is off" in world.explain(timeline, changes={"prefix_caching": False}).sentence
    timeline = slow_request(World(), needs_all="prompt_logprobs need")
    assert "prompt_logprobs need every token computed" in world.explain(timeline).sentence


def test_a_fully_cached_prompt_needs_no_reason():
    world = World()
    world.request(Running([*range(5210)], name="cmpl-a"), at=T - 9)
    timeline = slow_request(world, output=TokenCounts(num_prompt_tokens=5210, num_cached_tokens=5200))
    assert "prefill of 10 tokens in 3 steps (5,200 cached)" in world.explain(timeline).sentence


def test_a_long_pause_is_put_down_to_the_step_that_filled_it():
    world = World()
    timeline = slow_request(world)
    timeline.pause = (T + 3, 0.5)
    timeline.end("length", 200, T + 7.31)
    world.steps(step(T + 3.01, 0.45, num_tokens=2064, num_prompt_tokens=2048))
    assert (
        "(50 ms each, the longest pause 0.50 s, in a step of 2,064 tokens, 2,048 of them of prompts)"
        in world.explain(timeline).sentence
    )
    timeline.pause = (T + 5, 0.5)
    assert "the longest pause 0.50 s, in which no step ended)" in world.explain(timeline).sentence


def test_drafts_preemptions_and_restarts_are_told():
    counts = TokenCounts(num_prompt_tokens=5210, num_output_tokens=101, num_accepted_drafts=60, num_rejected_drafts=20)
    world = World()
    timeline = slow_request(world, output=counts, num_restarts=1, last=timing(1.9, 0.36, 5.0, num_preemptions=2))
    timeline.end("stop", 200, T + 7.31)
    sentence = world.explain(timeline).sentence
    assert "60 of 80 drafts accepted" in sentence
    assert "preempted 2 times for lack of KV blocks" in sentence
    assert "1 restart of the engine survived" in sentence
    assert "with an engine process that died" in sentence


def test_a_request_that_waits_is_explained_before_it_ends():
    world = World()
    timeline = world.request(Running([1, 2, 3]), Ahead(2, 30, 16))
    explained = world.explain(timeline, now=T + 3)
    assert explained.state == "waiting"
    assert explained.sentence == (
        "No token has come yet in 3.00 s: queued behind 2 requests (30 tokens) while 16 requests ran"
    )
    timeline.running.last = timing(2.0, 0.0)
    timeline.running.output = TokenCounts(num_prompt_tokens=3, num_output_tokens=9)
    timeline.begin_answer(T + 2.5)
    explained = world.explain(timeline, now=T + 3)
    assert (explained.state, explained.output.tokens, explained.outcome) == ("running", 9, None)


def test_a_refusal_is_explained_by_its_error():
    world = World()
    timeline = Timeline("req-9", "", T)
    timeline.end("rejected", 429, T + 0.002)
    timeline.error = "1024 requests wait"
    world.history.add_refused(timeline)
    explained = world.explain(timeline)
    assert explained.sentence == "Refused after 2.0 ms with 429 (rejected): 1024 requests wait"
    assert (explained.state, explained.queue, explained.prompt, explained.output) == ("refused", None, None, None)


def test_the_history_forgets_the_oldest_and_refusals_push_out_none_that_ran():
    history = RequestHistory(3)
    ran = [Timeline(f"ran-{index}", "", T + index) for index in range(5)]
    for timeline in ran:
        history.add(timeline)
    for index in range(10):
        history.add_refused(Timeline(f"refused-{index}", "", T + index))
    assert list(history) == ran[2:]
    assert history.find("ran-1", tenant=None) is None
    assert history.find("ran-2", tenant=None) is ran[2]
    assert history.find("refused-6", tenant=None) is None
    assert history.find("refused-9", tenant=None).request_id == "refused-9"


def test_of_requests_with_one_id_the_latest_of_the_tenant_is_found():
    history = RequestHistory()
    for index, tenant in enumerate(["a", "b", "a", "b"]):
        history.add(Timeline("same", tenant, T + index))
    assert history.find("same", tenant="a").arrived_at == T + 2
    assert history.find("same", tenant=None).arrived_at == T + 3
    assert history.find("same", tenant="c") is None


def test_prompts_are_let_go_when_all_together_are_too_long():
    history = RequestHistory(1000, max_kept_tokens=100)
    timelines = [Timeline(str(index), "", T + index) for index in range(50)]
    for timeline in timelines:
        timeline.admit(Running([*range(30)]), Ahead(), T)
        history.add(timeline)
        assert sum(len(kept.prompt) for kept in history) <= 100
    assert [len(kept.prompt) for kept in history] == [0] * 47 + [30] * 3
    longest = Timeline("long", "", T + 99)
    longest.admit(Running([*range(500)]), Ahead(), T)
    history.add(longest)
    assert longest.prompt == array("i", range(500)), "the newest is kept, whatever its length"
    assert sum(len(kept.prompt) for kept in history) == 500
