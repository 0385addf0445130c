"""The journal's accounts, checked with random histories and no process."""

from __future__ import annotations

import random

import pytest

from engine.journal import Entry, Journal
from engine.types import Request, SamplingParams, StepOutput, TokenLogprobs


def make_request(name: str, *, num_prompt_tokens: int = 3, max_tokens: int = 5, **params) -> Request:
    params = SamplingParams(seed=0, max_tokens=max_tokens, **params)
    return Request(request_id=name, prompt_token_ids=list(range(num_prompt_tokens)), params=params)


def send_due(journal: Journal) -> list[str]:
    due = journal.take_due()
    for entry in due:
        entry.add_number = 1
    return [entry.request.request_id for entry in due]


def scored(*token_ids: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -1.0, 1, [], []) for token in token_ids]


def test_the_counters_equal_a_recount_after_any_history() -> None:
    random_source = random.Random(5)
    journal, entries = Journal(), []
    for i in range(3000):
        action = random_source.choice(["add", "start", "emit", "remove", "die", "send"])
        if action == "add":
            request = make_request(str(i), num_prompt_tokens=random_source.randint(1, 9), max_tokens=10**6)
            entries.append(journal.add(request, now=0.0))
        elif action == "send":
            send_due(journal)
        elif action == "die" and random_source.random() < 0.2:
            blamed = [entry for entry in entries if entry.is_running and random_source.random() < 0.5]
            quarantined = journal.forget_process([entry.request.request_id for entry in blamed])
            entries = [entry for entry in entries if entry not in quarantined]
        elif entries:
            entry = random_source.choice(entries)
            if action == "start" and entry.add_number:
                journal.start(entry)
            elif action == "emit" and entry.is_running:
                entry.accept(StepOutput(request_id=entry.request.request_id, token_ids=[1, 2]))
                journal.clear(entry)
            elif action == "remove" and random_source.random() < 0.6:
                entries.remove(entry)
                journal.remove(entry)
        waiting = [entry for entry in entries if not entry.is_running]
        assert (len(journal), journal.num_waiting) == (len(entries), len(waiting))
        assert journal.num_waiting_tokens == sum(entry.num_tokens for entry in waiting)
        assert journal.num_running == len(entries) - len(waiting)


def test_every_request_is_due_once_and_again_after_a_death() -> None:
    journal = Journal()
    for name in "abc":
        journal.add(make_request(name), now=0.0)
    assert send_due(journal) == ["a", "b", "c"]
    assert send_due(journal) == []
    journal.add(make_request("d"), now=0.0)
    assert send_due(journal) == ["d"]
    assert journal.forget_process([]) == []
    assert send_due(journal) == ["a", "b", "c", "d"]


def test_suspects_are_replayed_one_at_a_time_before_the_others() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), now=0.0) for name in "abcd"}
    send_due(journal)
    journal.forget_process(["b", "d", "unknown"])
    assert send_due(journal) == ["b"]
    assert send_due(journal) == []
    journal.clear(entries["b"])
    assert send_due(journal) == ["d"]
    journal.remove(entries["d"])  # its client left
    assert send_due(journal) == ["a", "c"]


def test_a_request_in_the_batch_at_two_crashes_without_progress_is_quarantined() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), now=0.0) for name in "ab"}
    send_due(journal)
    assert journal.forget_process(["a", "b"]) == []
    send_due(journal)
    assert journal.forget_process(["a"]) == [entries["a"]]
    journal.clear(entries["b"])
    assert journal.forget_process(["b"]) == []
    assert journal.get("a") is None
    assert journal.get("b") is entries["b"]


def test_an_id_in_use_is_refused_and_free_after_the_end() -> None:
    journal = Journal()
    entry = journal.add(make_request("a"), now=0.0)
    with pytest.raises(ValueError, match="request id a is in use"):
        journal.add(make_request("a"), now=0.0)
    journal.remove(entry)
    journal.add(make_request("a"), now=0.0)


def test_prompt_logprobs_are_delivered_once_however_often_it_crashes() -> None:
    random_source = random.Random(3)
    for _ in range(200):
        journal = Journal()
        entry = journal.add(make_request("a", prompt_logprobs=0), now=0.0)
        delivered: list[TokenLogprobs] = []
        while len(delivered) < 20:
            position = 0
            while position < 20 and random_source.random() < 0.8:
                end = min(position + random_source.randint(1, 6), 20)
                output = StepOutput(request_id="a", prompt_logprobs=scored(*range(position, end)))
                news = entry.accept(output)
                delivered += [] if news is None else news.prompt_logprobs or []
                position = end
            journal.forget_process([])
        assert delivered == scored(*range(20))


@pytest.mark.parametrize(
    ("emitted", "params", "max_model_len", "finish_reason"),
    [
        ([], {"max_tokens": 0}, None, None),  # a request that only scores its prompt
        ([1, 2], {"max_tokens": 3}, None, None),
        ([1, 2, 3], {"max_tokens": 3}, None, "length"),
        ([1, 2], {"max_tokens": 9, "stop_token_ids": [2]}, None, "stop"),
        ([1, 2], {"max_tokens": 9, "stop_token_ids": [1]}, None, None),
        ([1, 2], {"max_tokens": 9}, 5, "length"),
        ([1, 2], {"max_tokens": 9}, 6, None),
    ],
)
def test_a_request_is_complete_when_its_emitted_tokens_say_so(
    emitted: list[int], params: dict, max_model_len: int | None, finish_reason: str | None
) -> None:
    entry = Entry(request=make_request("a", **params), registered_at=0.0, emitted=emitted)
    completion = entry.completion(max_model_len)
    assert (None if completion is None else completion.finish_reason) == finish_reason
