"""One step in numbers: what is a prompt's, and when the step began."""

import time

from engine.scheduling.step_stats import StepClock, count_work
from engine.types import Request, SamplingParams, Scheduled, Sequence


def sequence(num_tokens: int, num_computed: int) -> Sequence:
    request = Request(request_id="r", prompt_token_ids=[1] * num_tokens, params=SamplingParams(seed=0, max_tokens=9))
    return Sequence(request, [1] * num_tokens, num_computed_tokens=num_computed)


def test_prompt_tokens_are_those_of_sequences_that_lack_more_than_their_newest() -> None:
    decoding = Scheduled(sequence(10, 9), 1, 0, samples=True)
    with_drafts = Scheduled(sequence(10, 9), 4, 3, samples=True)
    chunk = Scheduled(sequence(90, 0), 64, 0, samples=False)
    chunk_of_one = Scheduled(sequence(90, 64), 1, 0, samples=False)
    last_chunk_with_drafts = Scheduled(sequence(90, 65), 28, 3, samples=True)
    assert count_work([decoding, with_drafts]).num_prompt_tokens == 0
    work = count_work([decoding, with_drafts, chunk, chunk_of_one, last_chunk_with_drafts])
    assert work.num_prompt_tokens == 64 + 1 + 25
    assert work.num_tokens == 1 + 4 + 64 + 1 + 28


def test_a_step_begins_on_the_clock_that_all_processes_share() -> None:
    before = time.monotonic()
    clock = StepClock()
    clock.lap("schedule")
    assert before <= clock.started_at <= time.monotonic()
    assert 0 <= clock.seconds["schedule"] <= time.monotonic() - before
