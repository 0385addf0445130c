"""Decides which sequences run in a step and what becomes of their tokens.

There is no prefill phase and no decode phase. Every sequence has tokens that are not in the KV cache yet; a step spends
its token budget on catching up. A prompt chunk, a single decoded token and a run of drafts are the same thing.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.batch.pooling import add_rows, is_complete
from engine.circuit_breaker import CircuitBreaker
from engine.kv_cache.groups import span_of_step
from engine.kv_cache.manager import KVCacheManager, Prefix, needs_prompt_scores
from engine.scheduling.fair_share import FairShare, arrival_order
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.prompt_pacing import PromptPacing
from engine.scheduling.prompt_share import prompt_share
from engine.scheduling.prompts_in_progress import PromptsInProgress
from engine.scheduling.request_queue import WaitingQueue
from engine.scheduling.step_outputs import one_more_token, output_of
from engine.scheduling.step_plan import StepPlan
from engine.scheduling.step_work import count_work
from engine.types import PromptLimit, Sampled, Scheduled, Sequence, StepOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A waiting sequence that had no room, and the counts then: it is looked at again when they change."""

    seq: Sequence
    num_needed: int  # free blocks
    num_gains: int  # `BlockPool.num_reuse_gains` then
    num_starts: int  # of sequences until then: one that started later may be computing its next block


class Scheduler:
    """Owns the waiting and running sequences, and alone writes their tokens and progress.

    Admission cannot thrash: a sequence is admitted only while every running one could still grow by its headroom, and
    each preemption doubles a sequence's headroom. So a request is preempted at most log2(max_tokens / headroom) times.

    pacing: where there is a target for the wait between tokens, who chooses the chunks of prompts beside streams
    """

    def __init__(self, kv: KVCacheManager, limits: SchedulerLimits) -> None:
        self.kv = kv
        self.is_ready: Callable[[Sequence], bool] = lambda _: True  # whether a waiting sequence may start
        self.limits = limits
        self.pacing: PromptPacing | None = None
        self.prompt_limit: PromptLimit = ""  # what ended the prompts' part of the last step
        self._full_budget = limits.max_num_batched_tokens
        self._check_room_for_one()
        self.fair_share = FairShare()
        self.waiting = WaitingQueue(self.fair_share)
        self.running: list[Sequence] = []  # in `arrival_order`
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits = 0
        self.num_first_prompt_tokens = 0  # of the sequences that have got their first token
        self._budget_breaker = CircuitBreaker()
        self._num_arrivals = self._num_starts = 0
        self._refusal: _Refusal | None = None
        self._by_id: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence. Raises ValueError where it could never run."""
        request_id = seq.request.request_id
        if request_id in self._by_id:
            raise ValueError(f"request id {request_id} is in use; ids must be unique among unfinished requests")
        if seq.num_tokens + (seq.request.pooling is None) > self.limits.max_model_len:
            raise ValueError(
                f"prompt has {seq.num_tokens} tokens, but max_model_len is {self.limits.max_model_len} and at least "
                "one token must be generated; shorten it or raise model.max_model_len"
            )
        seq.max_num_tokens = min(seq.num_prompt_tokens + seq.params.max_tokens, self.limits.max_model_len)
        seq.stop_token_ids = frozenset(seq.params.stop_token_ids)
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._by_id[request_id] = seq
        self.fair_share.add(seq)
        self.waiting.push(seq)

    def abort(self, request_id: str) -> Sequence | None:
        """Forgets the request and frees its blocks; None if it is unknown or has finished."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return None
        if not self.waiting.remove(seq):
            self.running.remove(seq)
        self._forget(seq)
        return seq

    def schedule(self) -> list[Scheduled]:
        """Makes the batch of the next step.

        Sequences that lack a single token come first: theirs are the streams that somebody is reading. What is left
        of the budget, or as much of it as these streams can wait for, goes to those further behind, in order of
        service, and then to new ones. Among several tenants, a new one may come before others' that are behind.
        """
        num_seqs = min(len(self.running) + len(self.waiting), self.limits.max_num_seqs)
        plan = StepPlan(self.limits.max_num_batched_tokens, self.limits.num_logits_rows, num_seqs)
        num_preemptions = self.num_preemptions
        caught_up: list[Sequence] = []
        behind: list[Sequence] = []
        for seq in self.running:
            (caught_up if _is_caught_up(seq) else behind).append(seq)
        self._continue_streams(caught_up, plan)
        if caught_up and (behind or len(self.waiting)):
            self._pace_prompts(plan, len(caught_up), behind)
        for seq in self.in_service_order(behind):
            if self.fair_share.is_shared and self.num_preemptions == num_preemptions:
                self._admit(plan, ahead_of=seq)
            plan.num_to_come -= 1
            self._continue(seq, plan, plan.room_for(seq))
        if self.num_preemptions == num_preemptions:
            self._admit(plan)
        self.prompt_limit = "" if plan.pace is None else plan.pace.limit
        self.fair_share.charge(plan.items.values())
        return list(plan.items.values())

    def in_service_order(self, seqs: list[Sequence]) -> list[Sequence]:
        """Running sequences in the order in which a step's budget is given to them."""
        if not self.fair_share.is_shared:
            return seqs
        now = time.monotonic()
        return sorted(seqs, key=lambda seq: self.fair_share.order(seq, now))

    def update(self, batch: list[Scheduled], sampled: list[Sampled]) -> list[StepOutput]:
        """Commits a step: the tokens that were computed, and those that were sampled for each item."""
        now, outputs = time.monotonic(), []
        for item, result in zip(batch, sampled, strict=True):
            seq = item.seq
            if item.num_new_tokens == 1 and self._goes_on(seq, result):  # most of them
                outputs.append(one_more_token(seq, result))
                continue
            add_rows(seq, result)
            seq.num_computed_tokens += item.num_new_tokens
            if item.num_drafts:
                seq.num_computed_tokens += len(result.accepted) - item.num_drafts
                seq.num_drafts += item.num_drafts
                seq.num_accepted_drafts += len(result.accepted)
            if seq.draft_token_ids:  # also those left out of the step: they do not follow the newest token
                seq.draft_token_ids, seq.draft_parents = [], []
            seq.num_scored_tokens += item.num_scored
            token_ids = self._append(seq, result.token_ids)
            if result.is_over and seq.finish_reason != "stop" and len(token_ids) == len(result.token_ids):
                seq.finish_reason = "stop"
            if seq.first_token_at is None:
                seq.num_prefill_chunks += 1
                if token_ids or is_complete(seq):
                    seq.first_token_at = now
                    self.num_first_prompt_tokens += _num_computed_prompt_tokens(seq)
            if result.error is not None:
                seq.finish_reason = "error"  # what it wrote into the cache may be wrong, in earlier steps too
                self.kv.uncache(seq)
            else:
                self.kv.commit(seq)
                if is_complete(seq):
                    seq.finish_reason = "stop"
            if token_ids or result.prompt_logprobs or seq.finish_reason:
                outputs.append(output_of(seq, token_ids, result, now))
            if seq.finish_reason:
                self.running.remove(seq)
                self._forget(seq)
        return outputs

    @property
    def is_budget_lowered(self) -> bool:
        return self.limits.max_num_batched_tokens < self._full_budget

    def lower_budget(self, num_tokens: int) -> None:
        """Steps have at most so many tokens for a while, or one for each request that may run, if that is more."""
        lowered = max(num_tokens, self.limits.max_num_seqs)
        self._budget_breaker.trip()
        if lowered < self.limits.max_num_batched_tokens:
            self.limits = replace(self.limits, max_num_batched_tokens=lowered)
            logger.warning(
                "steps have at most %d tokens for a while; if this comes again, set scheduler.max_num_batched_tokens",
                lowered,
            )

    def note_quiet_step(self) -> None:
        """Notes a step that had enough memory. After many of them, `lower_budget` is undone."""
        if self._budget_breaker.step():
            self.limits = replace(self.limits, max_num_batched_tokens=self._full_budget)
            logger.info("steps have up to %d tokens again", self._full_budget)

    def _check_room_for_one(self) -> None:
        """Raises ValueError where a request of max_model_len could not run even alone."""
        kv, limits = self.kv, self.limits
        num_blocks = self._num_blocks_at_most(limits.max_model_len)
        if num_blocks <= kv.pool.num_blocks:
            return
        needs = f"needs {num_blocks} KV blocks of {kv.block_size} tokens"
        fits = bisect_right(range(limits.max_model_len), kv.pool.num_blocks, key=self._num_blocks_at_most) - 1
        windows = [group.window for group in kv.groups if group.window is not None]
        if len(windows) == kv.num_groups:
            raise ValueError(
                f"one request {needs}, for a window of {max(windows)} and a step of {limits.max_num_batched_tokens}, "
                f"not {kv.pool.num_blocks}; lower scheduler.max_num_batched_tokens or raise kv_cache.memory"
            )
        raise ValueError(
            f"one request of max_model_len ({limits.max_model_len} tokens) {needs}, not {kv.pool.num_blocks}; lower "
            f"model.max_model_len to {fits} or raise kv_cache.memory"
        )

    def _num_blocks_at_most(self, num_tokens: int) -> int:
        return self.kv.num_blocks_at_most(num_tokens + self.limits.num_lookahead_tokens, self._span)

    def share_of_prompts(self, num_decoding: int, behind: list[Sequence]) -> int | None:
        """Prompt tokens of a step that so many others decode in; None: as many as the budget allows."""
        if self.limits.min_prompt_share is None:
            return None
        read = behind or ([self.waiting.first] if len(self.waiting) else [])
        return prompt_share(self.limits.min_prompt_share, num_decoding, (seq.num_tokens for seq in read))

    def _pace_prompts(self, plan: StepPlan, num_streams: int, behind: list[Sequence]) -> None:
        """Bounds what prompts get of a step, once its streams are planned."""
        if self.pacing is not None:
            plan.pace = self.pacing.begin(count_work(plan.items.values()))
        elif (share := self.share_of_prompts(num_streams, behind)) is not None:
            plan.budget = min(plan.budget, share)

    def _continue_streams(self, caught_up: list[Sequence], plan: StepPlan) -> None:
        """Schedules the newest token of each sequence that lacks no other, and its drafts."""
        num_after, size, num_lookahead = len(caught_up), self.kv.block_size, self.limits.num_lookahead_tokens
        items, budget = plan.items, plan.budget
        for seq in caught_up:
            num_after -= 1  # each of them gets a token before this one's drafts do
            plan.num_to_come -= 1
            num_tokens, num_drafts = len(seq.token_ids), len(seq.draft_token_ids)
            if num_drafts:
                num_rows = plan.num_logits - plan.num_to_come
                num_drafts = _num_verified_drafts(seq, min(budget - num_after, num_rows) - 1)
            tables = seq.block_tables
            has_place = tables and num_tokens + num_drafts + num_lookahead <= len(tables[0]) * size
            is_plain = seq.request.params.prompt_logprobs is None and seq.request.pooling is None
            if has_place and num_drafts >= 0 and budget > num_drafts and is_plain:
                items[seq.arrival] = Scheduled(seq, 1 + num_drafts, num_drafts, True)
                budget -= 1 + num_drafts
                plan.num_logits -= 1 + num_drafts
            else:
                plan.budget = budget
                self._continue(seq, plan, max(budget - num_after, 1))
                budget = plan.budget
        plan.budget = budget

    def _continue(self, seq: Sequence, plan: StepPlan, budget: int) -> None:
        if plan.budget == 0 or not seq.block_tables:  # without blocks, an older sequence has just preempted it
            return
        item = self._fit(seq, budget, plan)
        num_tokens = seq.num_computed_tokens + item.num_new_tokens + self.limits.num_lookahead_tokens
        if not self.kv.allocate(seq, num_tokens):
            self._take_back_blocks_of_drafts(plan)
        while not self.kv.allocate(seq, num_tokens):
            victim = self.in_service_order(self.running)[-1]
            plan.drop(victim)
            self._preempt(victim)
            if victim is seq:
                return
        plan.add(item)

    def _take_back_blocks_of_drafts(self, plan: StepPlan) -> None:
        """Frees the blocks that hold nothing but guesses: of drafts that were wrong, and of those in the plan, which
        loses them. A sequence that is preempted costs more than any guess may gain."""
        for seq in self.running:
            item = plan.items.get(seq.arrival)
            if item is not None and item.num_drafts:
                plan.drop(seq)
                plan.add(replace(item, num_new_tokens=item.num_new_tokens - item.num_drafts, num_drafts=0))
            self.kv.give_back(seq, seq.num_tokens + self.limits.num_lookahead_tokens)

    def _admit(self, plan: StepPlan, ahead_of: Sequence | None = None) -> None:
        """Starts waiting sequences while budget, seats and memory last, in order of service.

        A sequence whose next prefix block is being computed by another waits for it instead of computing it again.

        ahead_of: only those that come before it
        """
        if not self._may_admit(plan, ahead_of):
            return
        held: list[Sequence] = []
        in_progress = PromptsInProgress(self.kv, [seq for seq in self.running if not _is_caught_up(seq)])
        num_reserved = sum(map(self._num_reserved_blocks, self.running))
        while self._may_admit(plan, ahead_of):
            seq = self.waiting.first
            if len(self.running) == self.limits.max_num_seqs:
                self._takes_place(seq, 1, _one_seat, self.limits.max_num_seqs, plan)
                break
            if not self.is_ready(seq):  # those behind it go on
                held.append(self.waiting.pop())
                continue
            if self._is_still_refused(seq, num_reserved):
                break
            prefix = self._find_prefix(seq, plan)
            if prefix is None:
                break
            if len(held) < self.limits.max_num_seqs and in_progress.have_next_block(seq, prefix):
                held.append(self.waiting.pop())
                continue
            num_needed = self.kv.num_blocks_to_start(prefix, self._num_reserved_tokens(seq), self._span)
            if num_needed + num_reserved > self.kv.pool.num_free:
                if self._takes_place(seq, num_needed, _num_owned_blocks, self.kv.pool.num_blocks, plan):
                    break  # what that leaves is seen in the next step
                self._refusal = _Refusal(seq, num_needed, self.kv.pool.num_reuse_gains, self._num_starts)
                break
            self._start(self.waiting.pop(), prefix)
            in_progress.add(seq)
            plan.num_to_come = max(plan.num_to_come - 1, 0)
            self._continue(seq, plan, plan.room_for(seq))
            num_reserved += self._num_reserved_blocks(seq)
        for seq in held:
            self.waiting.push(seq)

    def _takes_place(
        self, seq: Sequence, needed: int, holding: Callable[[Sequence], int], capacity: int, plan: StepPlan
    ) -> bool:
        """Whether a running sequence was preempted for a waiting one, whose tenant has less than its share."""
        if not self.fair_share.is_shared:
            return False
        victim = self.fair_share.victim(seq, self.running, holding, needed, capacity)
        if victim is not None:
            plan.drop(victim)
            self._preempt(victim)
        return victim is not None

    def _find_prefix(self, seq: Sequence, plan: StepPlan) -> Prefix | None:
        """None: it takes more hashing than this step has left, as others wait for it; the next ones go on."""
        num_known = len(seq.block_hashes)
        prefix = self.kv.find_prefix(seq, max_num_hashes=plan.num_hashes if self.running else None)
        plan.num_hashes -= min(len(seq.block_hashes) - num_known, plan.num_hashes)
        return prefix

    def _is_still_refused(self, seq: Sequence, num_reserved: int) -> bool:
        """Whether what has changed since it was refused cannot have made room for it, or somebody to wait for."""
        refusal = self._refusal
        if refusal is None or refusal.seq is not seq or refusal.num_starts != self._num_starts:
            return False
        num_spared = self.kv.max_num_spared_blocks(refusal.num_gains)
        if num_spared is None:
            return False
        return refusal.num_needed - num_spared + num_reserved > self.kv.pool.num_free

    def _may_admit(self, plan: StepPlan, ahead_of: Sequence | None) -> bool:
        if plan.budget <= 0 or not self.waiting:
            return False
        if not self.fair_share.is_shared:
            return len(self.running) < self.limits.max_num_seqs
        if ahead_of is None:
            return True
        now = time.monotonic()
        return self.fair_share.order(self.waiting.first, now) < self.fair_share.order(ahead_of, now)

    def _start(self, seq: Sequence, prefix: Prefix) -> None:
        self.kv.start(seq, prefix)
        self._num_starts += 1
        num_hits = min(seq.num_computed_tokens, seq.num_prompt_tokens)
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = num_hits
            self.num_prefix_queries += seq.num_prompt_tokens
            self.num_prefix_hits += num_hits
        # The first allocation cannot fail, because `_admit` has counted it; no tables mean "preempted".
        allocated = self.kv.allocate(seq, seq.num_computed_tokens + 1)
        assert allocated, "a sequence was admitted without room"
        insort(self.running, seq, key=arrival_order)

    def _num_reserved_blocks(self, seq: Sequence) -> int:
        """Free blocks that are reserved for a running sequence."""
        return self.kv.num_blocks_to_grow(seq, self._num_reserved_tokens(seq), self._span)

    def _num_reserved_tokens(self, seq: Sequence) -> int:
        """Tokens that the sequence must be able to grow to before another is admitted."""
        limits = self.limits
        headroom = limits.headroom << min(seq.num_preemptions, 20)
        return min(seq.num_tokens + headroom, seq.max_num_tokens) + limits.num_lookahead_tokens

    @property
    def _span(self) -> int:
        return span_of_step(self._full_budget, self.kv.block_size, self.limits.num_lookahead_tokens)

    def _fit(self, seq: Sequence, budget: int, plan: StepPlan) -> Scheduled:
        """As many of the sequence's tokens as the budget allows, and as many of its drafts as may still count.

        Of the plan's rows of logits it may have all but one for each sequence that is still to come.
        """
        num_logits = plan.num_logits - plan.num_to_come
        computed = seq.num_computed_tokens
        num_verified = min(seq.num_tokens - computed, budget)
        if needs_prompt_scores(seq):
            return self._fit_scored(seq, num_verified, num_logits)
        samples = computed + num_verified == seq.num_tokens and seq.request.pooling is None
        num_drafts = _num_verified_drafts(seq, min(budget - num_verified, num_logits - 1)) if samples else 0
        if num_drafts:
            num_drafts = self._num_drafts_with_room(seq, num_drafts, plan)
        return Scheduled(seq, num_verified + num_drafts, num_drafts, samples)

    def _num_drafts_with_room(self, seq: Sequence, num_drafts: int, plan: StepPlan) -> int:
        """Drafts for which there are blocks that no running sequence needs for its own tokens in this step: a guess
        must not preempt anybody."""
        if plan.num_spare_blocks is None:
            plan.num_spare_blocks = self.kv.pool.num_free - sum(map(self._num_blocks_of_step, self.running))
        num_tokens = seq.num_tokens + self.limits.num_lookahead_tokens
        num_blocks = max(self.kv.num_blocks_for(num_tokens), len(seq.block_tables[0]))
        num_extra = max(self.kv.num_blocks_for(num_tokens + num_drafts) - num_blocks, 0)
        num_extra = min(num_extra, max(plan.num_spare_blocks, 0) // self.kv.num_groups)
        plan.num_spare_blocks -= num_extra * self.kv.num_groups
        return max(min(num_drafts, (num_blocks + num_extra) * self.kv.block_size - num_tokens), 0)

    def _num_blocks_of_step(self, seq: Sequence) -> int:
        """Blocks that a sequence lacks for its own tokens, those of a whole prompt as far as a step may reach."""
        end = min(seq.num_tokens, seq.num_computed_tokens + self.limits.max_num_batched_tokens)
        return self.kv.num_missing_blocks(seq, end + self.limits.num_lookahead_tokens)

    def _fit_scored(self, seq: Sequence, num_new_tokens: int, num_logits: int) -> Scheduled:
        """A chunk whose rows score the prompt tokens that follow them.

        Rows that were scored before (the sequence was preempted) are computed without logits in a chunk of their own,
        and no chunk reaches from the prompt into the output: so the rows with logits are always the chunk's last.
        """
        computed, num_prompt = seq.num_computed_tokens, seq.num_prompt_tokens
        if computed < seq.num_scored_tokens:
            return Scheduled(seq, min(num_new_tokens, seq.num_scored_tokens - computed), 0, samples=False)
        end = num_prompt if seq.num_tokens == num_prompt else num_prompt - 1
        num_new_tokens = min(num_new_tokens, end - computed, num_logits)
        num_scored = min(computed + num_new_tokens, num_prompt - 1) - computed
        samples = computed + num_new_tokens == seq.num_tokens
        return Scheduled(seq, num_new_tokens, 0, samples, num_scored)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.kv.free(seq)
        seq.draft_token_ids, seq.draft_parents = [], []
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(seq)

    def _goes_on(self, seq: Sequence, result: Sampled) -> bool:
        """Commits the token of a step of one token in the middle of an answer. False, and nothing has changed, if the
        step was more than that: the first token, the last one, an error, a prompt's."""
        token_ids, known = result.token_ids, seq.token_ids
        if not token_ids or seq.first_token_at is None or result.prompt_logprobs is not None or seq.draft_token_ids:
            return False
        if len(known) + 1 >= seq.max_num_tokens or token_ids[0] in seq.stop_token_ids or result.is_over:
            return False
        known.append(token_ids[0])
        seq.num_computed_tokens += 1
        if seq.num_computed_tokens % self.kv.block_size == 0 or self.kv.has_windows:
            self.kv.commit(seq)
        return True

    def _append(self, seq: Sequence, token_ids: list[int]) -> list[int]:
        """Appends tokens up to the first that ends the sequence; returns those that count."""
        params, known = seq.request.params, seq.token_ids
        for i, token_id in enumerate(token_ids):
            known.append(token_id)
            if token_id in seq.stop_token_ids and seq.num_output_tokens > params.min_tokens:
                seq.finish_reason, seq.stop_token_id = "stop", token_id
                return token_ids[: i + 1]
            if len(known) >= seq.max_num_tokens:
                seq.finish_reason = "length"
                return token_ids[: i + 1]
        return token_ids

    def _forget(self, seq: Sequence) -> None:
        self.kv.free(seq)
        self.fair_share.remove(seq)
        del self._by_id[seq.request.request_id]


def _one_seat(_: Sequence) -> int:
    return 1


def _num_owned_blocks(seq: Sequence) -> int:
    return sum(map(len, seq.block_tables))


def _num_verified_drafts(seq: Sequence, budget: int) -> int:
    """The number of a sequence's drafts to verify: limited by the budget and by the tokens that it may still get."""
    return min(len(seq.draft_token_ids), budget, seq.max_num_tokens - seq.num_tokens - 1)


def _is_caught_up(seq: Sequence) -> bool:
    return len(seq.token_ids) - seq.num_computed_tokens == 1


def _num_computed_prompt_tokens(seq: Sequence) -> int:
    """Prompt tokens computed, for a first token; 0 for a replayed sequence, whose first token is an old one."""
    return 0 if seq.request.output_token_ids else seq.num_prompt_tokens - seq.num_cached_tokens
