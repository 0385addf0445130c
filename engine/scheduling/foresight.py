"""The batch of the next step, foreseen while this one is still running (async scheduling).

It is right if no request ends, arrives or is aborted in between. The scheduler therefore makes the batch again when its
time has come, and only results of items that are in both count: a wrong guess costs time, never correctness.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_work import count_work
from engine.types import Scheduled, Sequence


class _Outlook(NamedTuple):
    """The progress of a sequence when this step is over. num_lacking: tokens that will not be computed then"""

    seq: Sequence
    num_ahead: int  # tokens that this step computes
    source: int  # the sampled row of this step that gives its newest token, or -1
    num_lacking: int


def foresee(scheduler: Scheduler, batch: list[Scheduled]) -> list[Scheduled] | None:
    """The batch that the scheduler will make when `batch` has run, with its blocks allocated. None if that is unknown.

    It is where new sequences may be admitted, blocks are short, drafts are verified or prompts are scored or pooled.
    """
    caught_up: list[_Outlook] = []
    behind: list[_Outlook] = []
    for outlook in _outlooks(scheduler, batch):
        if outlook is None:
            return None
        (caught_up if outlook.num_lacking == 1 else behind).append(outlook)
    limits = scheduler.limits
    places = {seq: place for place, seq in enumerate(scheduler.in_service_order([one.seq for one in behind]))}
    behind.sort(key=lambda one: places[one.seq])
    budget = limits.max_num_batched_tokens - len(caught_up)
    plan = [Scheduled(one.seq, 1, 0, True, 0, one.num_ahead, one.source) for one in caught_up]
    pacing, pace = scheduler.pacing, None
    if caught_up and behind and pacing is not None:
        pace = pacing.foresee(count_work(plan))
    elif caught_up and pacing is None:
        share = scheduler.share_of_prompts(len(caught_up), [outlook.seq for outlook in behind])
        budget = budget if share is None else min(budget, share)
    for one in behind:
        num_new_tokens = min(one.num_lacking, budget)
        if pace is not None and num_new_tokens > 0:
            room = pace.room(one.seq, one.seq.num_computed_tokens + one.num_ahead, num_new_tokens)
            budget = budget if room == num_new_tokens else room  # none is left for others
            num_new_tokens = room
        if num_new_tokens <= 0:
            break
        budget -= num_new_tokens
        plan.append(
            Scheduled(one.seq, num_new_tokens, 0, num_new_tokens == one.num_lacking, 0, one.num_ahead, one.source)
        )
    found_no_room = not behind and all(item.num_new_tokens == 1 for item in batch)  # for waiting ones, in this step
    is_full = budget <= 0 or len(scheduler.running) >= limits.max_num_seqs
    if not plan or (len(scheduler.waiting) and not (found_no_room or is_full)):
        return None
    ends = ((item.seq, item.num_computed_tokens + item.num_new_tokens) for item in plan)
    return plan if scheduler.kv.allocate_all(ends) else None  # a guess preempts no sequence


def _outlooks(scheduler: Scheduler, batch: list[Scheduled]) -> list[_Outlook | None]:
    """The outlooks of the running sequences that go on after the step, in their order; [None] if one is unknown."""
    running = {item.seq: item for item in batch}
    sources: dict[Sequence, int] = {}
    for item in batch:
        if item.num_drafts or item.num_scored:
            return [None]
        if item.samples:
            sources[item.seq] = len(sources)
    outlooks: list[_Outlook | None] = []
    for seq in scheduler.running:
        num_ahead = running[seq].num_new_tokens if seq in running else 0
        source = sources.get(seq, -1)
        num_tokens = seq.num_tokens + (source >= 0)
        is_scored = seq.params.prompt_logprobs is not None and num_tokens == seq.num_tokens
        if is_scored or seq.request.pooling is not None:
            return [None]
        if source < 0 or num_tokens < seq.max_num_tokens:  # else the token that is being sampled is its last
            outlooks.append(_Outlook(seq, num_ahead, source, num_tokens - seq.num_computed_tokens - num_ahead))
    return outlooks
