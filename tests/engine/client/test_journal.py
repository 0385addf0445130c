"""The journal's accounts, checked with random histories and no process."""

from __future__ import annotations

import random

import pytest

from engine.client.deaths import Death, Deaths, Verdict
from engine.client.journal import TRIAL_TOKENS, Entry, Journal
from engine.client.outbox import Outbox
from engine.config import SupervisionConfig
from engine.ipc.inflight_record import InflightRequest
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
            entries.append(journal.add(request, outbox=Outbox(), now=0.0))
        elif action == "send":
            send_due(journal)
        elif action == "die" and random_source.random() < 0.2:
            blamed = [entry for entry in entries if entry.is_running and random_source.random() < 0.5]
            quarantined, _ = journal.forget_process([entry.request.request_id for entry in blamed])
            entries = [entry for entry in entries if entry not in quarantined]
        elif entries:
            entry = random_source.choice(entries)
            if action == "start" and entry.add_number:
                journal.start(entry)
            elif action == "emit" and entry.is_running:
                entry.accept(StepOutput(request_id=entry.request.request_id, token_ids=[1, 2]))
                if journal.passes_trial(entry) and journal.has_suspects:
                    journal.withdraw(entry)
            elif action == "remove" and random_source.random() < 0.6:
                entries.remove(entry)
                random_source.choice([journal.remove, journal.leave])(entry)
        waiting = [entry for entry in entries if not entry.is_running]
        assert (len(journal), journal.num_waiting) == (len(entries), len(waiting))
        assert journal.num_waiting_tokens == sum(entry.num_tokens for entry in waiting)
        assert journal.num_running == len(entries) - len(waiting)


def test_every_request_is_due_once_and_again_after_a_death() -> None:
    journal = Journal()
    for name in "abc":
        journal.add(make_request(name), outbox=Outbox(), now=0.0)
    assert send_due(journal) == ["a", "b", "c"]
    assert send_due(journal) == []
    journal.add(make_request("d"), outbox=Outbox(), now=0.0)
    assert send_due(journal) == ["d"]
    assert journal.forget_process([])[0] == []
    assert send_due(journal) == ["a", "b", "c", "d"]


def give(journal: Journal, entry: Entry, num_tokens: int) -> bool:
    journal.start(entry)
    entry.accept(StepOutput(request_id=entry.request.request_id, token_ids=[1] * num_tokens))
    return journal.passes_trial(entry)


def test_suspects_are_tried_one_at_a_time_before_the_others() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), outbox=Outbox(), now=float(at)) for at, name in enumerate("abcd")}
    send_due(journal)
    journal.forget_process(["b", "d", "unknown"])
    assert send_due(journal) == ["b"]
    assert not give(journal, entries["b"], TRIAL_TOKENS - 1)
    assert send_due(journal) == []
    assert give(journal, entries["b"], 1)
    journal.withdraw(entries["b"])
    assert send_due(journal) == ["d"]
    journal.leave(entries["d"])
    assert send_due(journal) == ["a", "b", "c"]


def test_those_whose_answer_has_begun_are_tried_first_and_those_that_died_alone_last() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), outbox=Outbox(), now=0.0) for name in "abc"}
    send_due(journal)
    give(journal, entries["c"], 1)
    journal.forget_process(["a", "b", "c"])
    assert send_due(journal) == ["c"]
    journal.forget_process(["c"])
    assert send_due(journal) == ["a"]


def test_only_a_second_death_in_a_step_of_its_own_quarantines_a_suspect() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), outbox=Outbox(), now=0.0) for name in "ab"}
    send_due(journal)
    assert journal.forget_process(["a"]) == ([], Verdict(has_suspect=False, culprit_ids=frozenset()))
    send_due(journal)
    assert journal.forget_process([]) == ([], Verdict(has_suspect=True, culprit_ids=frozenset()))  # between two steps
    send_due(journal)
    assert journal.forget_process(["a"]) == ([], Verdict(has_suspect=True, culprit_ids=frozenset()))
    send_due(journal)
    assert journal.forget_process(["a"]) == ([entries["a"]], Verdict(has_suspect=True, culprit_ids=frozenset("a")))
    assert journal.get("a") is None
    assert send_due(journal) == ["b"]


def test_a_suspect_that_leaves_untried_is_at_fault_where_all_others_go_on() -> None:
    journal = Journal()
    entries = {name: journal.add(make_request(name), outbox=Outbox(), now=0.0) for name in "abc"}
    send_due(journal)
    journal.leave(entries["b"])  # while the step runs that the process dies in
    journal.forget_process(["a", "b", "c"])
    journal.leave(entries["c"])  # before it is sent again
    send_due(journal)
    _, verdict = journal.forget_process([])
    assert verdict.culprit_ids == set()  # it may have been the one that was not tried yet
    send_due(journal)
    assert give(journal, entries["a"], TRIAL_TOKENS)
    _, verdict = journal.forget_process(["a"])
    assert verdict.culprit_ids == {"b", "c"}


@pytest.mark.parametrize("seed", range(40))
def test_whoever_kills_the_process_is_quarantined_and_nobody_else(seed: int) -> None:
    """Kills from outside come too, but no request is hit twice alone by them."""
    chance = random.Random(seed)
    journal, deaths = Journal(), Deaths(SupervisionConfig(max_deaths=10**6))
    names = [str(i) for i in range(chance.randint(1, 20))]
    entries = {name: journal.add(make_request(name, max_tokens=10**6), outbox=Outbox(), now=0.0) for name in names}
    poisoned = {name for name in entries if chance.random() < 0.2}
    running: list[Entry] = []
    quarantined: set[str] = set()
    hit_alone: set[str] = set()
    num_kills = 0
    for _ in range(400):
        due = journal.take_due()
        for entry in due:
            entry.add_number = 1
        running += due
        batch = [entry.request.request_id for entry in running]
        dies = bool(poisoned & set(batch))
        if not dies and chance.random() < 0.03 and not (len(batch) == 1 and batch[0] in hit_alone):
            dies = True
            num_kills += 1
            hit_alone |= set(batch) if len(batch) == 1 else set()
        if dies:
            ended, verdict = journal.forget_process(batch)
            deaths.add(make_death(batch), verdict)
            quarantined |= {entry.request.request_id for entry in ended}
            running = []
            continue
        for entry in list(running):
            if give(journal, entry, 1) and journal.has_suspects:
                journal.withdraw(entry)
                running.remove(entry)
    assert quarantined == poisoned
    assert deaths.num_counted <= num_kills


def make_death(batch: list[str]) -> Death:
    return Death(
        at=0.0,
        reason="",
        exit_code=1,
        was_ready=True,
        was_killed_before_its_first_step=False,
        batch=[InflightRequest(name, 0, 1, 0) for name in batch],
        output_tail=[],
    )


def test_deaths_without_any_progress_end_it_at_last_whatever_they_are_put_down_to() -> None:
    deaths = Deaths(SupervisionConfig(max_deaths=2))
    verdict = Verdict(has_suspect=True, culprit_ids=frozenset())
    for _ in range(19):
        deaths.add(make_death(["a"]), verdict)
    assert deaths.describe_excess() is None
    deaths.note_progress()
    for _ in range(19):
        deaths.add(make_death(["a"]), verdict)
    assert deaths.describe_excess() is None
    deaths.add(make_death(["a"]), verdict)
    assert deaths.describe_excess() == "the engine process died 20 times in a row without computing anything"


def test_an_id_in_use_is_refused_and_free_after_the_end() -> None:
    journal = Journal()
    entry = journal.add(make_request("a"), outbox=Outbox(), now=0.0)
    with pytest.raises(ValueError, match="request id a is in use"):
        journal.add(make_request("a"), outbox=Outbox(), now=0.0)
    journal.remove(entry)
    journal.add(make_request("a"), outbox=Outbox(), now=0.0)


def test_prompt_logprobs_are_delivered_once_however_often_it_crashes() -> None:
    random_source = random.Random(3)
    for _ in range(200):
        journal = Journal()
        entry = journal.add(make_request("a", prompt_logprobs=0), outbox=Outbox(), now=0.0)
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
    entry = Entry(request=make_request("a", **params), registered_at=0.0, emitted=emitted, outbox=Outbox())
    completion = entry.completion(max_model_len)
    assert (None if completion is None else completion.finish_reason) == finish_reason
