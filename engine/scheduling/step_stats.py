"""One step in numbers: where its time went and what the model's arithmetic demanded."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappushpop

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_work import StepWork, count_work
from engine.types import DraftOutcome, Sampled, Scheduled, StepOutput, StepStats

MIN_PACE_TOKENS = 32  # of a step from which its pace is learned: fewer are bound by memory, not by arithmetic
NUM_WITNESSES = 3


class StepClock:
    """Splits a step's wall time into named laps, in seconds."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started_at = time.monotonic()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What a step must at least read and compute.

    weight_bytes: read once per step; flops_per_token: two per parameter of the layers' matrix products that a token
    takes part in; flops_per_logits: of the output layer, for one row; kv_bytes_per_token: of all layers;
    attention_flops_per_pair: for one query token and one token of its context; expert_bytes: of all experts, of which a
    token is sent to `expert_share`; is_queued: a forward pass only queues its work, and ends when tokens are known.
    """

    weight_bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    flops_per_logits: int = 0
    expert_bytes: int = 0
    expert_share: float = 0.0
    is_queued: bool = False

    def bytes_moved(self, work: StepWork) -> int:
        if not work.num_tokens:
            return 0
        # Of the experts, what is read on average where tokens choose alike: each leaves out 1 - `expert_share`.
        experts = int(self.expert_bytes * (1 - (1 - self.expert_share) ** work.num_tokens))
        return self.weight_bytes + work.num_kv_tokens * self.kv_bytes_per_token + experts

    def flops(self, work: StepWork) -> int:
        per_row = work.num_tokens * self.flops_per_token + work.num_logits * self.flops_per_logits
        return per_row + work.num_pairs * self.attention_flops_per_pair


class StepPace:
    """The operations per second that steps reach, at best: noise of other programs can only make a step look slower.

    Best is what three steps have reached, so that no odd reading of the clock counts. `save` hears of what is better
    than what was known by more than a twentieth.
    """

    def __init__(self, known: float = 0.0, save: Callable[[float], object] = lambda rate: None) -> None:
        self.known = known
        self._save = save
        self._best = [0.0] * NUM_WITNESSES  # a heap

    def learn(self, stats: StepStats) -> None:
        if stats.num_tokens < MIN_PACE_TOKENS or stats.computing <= 0.0:
            return
        heappushpop(self._best, stats.flops / stats.computing)
        if self._best[0] > 1.05 * self.known:
            self.known = self._best[0]
            self._save(self.known)


class StepRecorder:
    """Gathers a step's numbers while it runs. Make one per step, before scheduling."""

    def __init__(self, scheduler: Scheduler, cost: ModelCost) -> None:
        self.clock = StepClock()
        self._scheduler, self._cost = scheduler, cost
        self._before = _counters(scheduler)

    def plan(self, batch: list[Scheduled]) -> StepWork:
        """Notes the work of the step's batch, before the sequences' progress changes."""
        self._work, self._num_seqs = count_work(batch), len(batch)
        return self._work

    def stats(
        self,
        sampled: list[Sampled],
        outputs: list[StepOutput],
        degraded_modes: list[str],
        draft_outcome: DraftOutcome = "",
        *,
        predicted: float = 0.0,
    ) -> StepStats:
        pool = self._scheduler.kv.pool
        preemptions, queries, hits, first_prompt_tokens = (
            after - before for after, before in zip(_counters(self._scheduler), self._before, strict=True)
        )
        work, seconds = self._work, self.clock.seconds
        has_failed = any(result.error is not None for result in sampled)  # some of the work was not done, or twice
        num_accepted = [len(result.accepted) for result in sampled] if work.drafts else []
        return StepStats(
            num_tokens=work.num_tokens,
            num_seqs=self._num_seqs,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            schedule=seconds["schedule"],
            forward=seconds["forward"],
            sample=seconds["sample"],
            update=seconds["update"],
            propose=seconds["propose"],
            num_blocks=pool.num_blocks,
            num_owned_blocks=pool.num_owned,
            num_cached_blocks=pool.num_cached_free,
            num_preemptions=preemptions,
            num_prefix_queries=queries,
            num_prefix_hits=hits,
            num_drafts=len(work.drafts),
            num_draft_tokens=sum(work.drafts),
            accepted_by_position=[
                sum(n > depth for n in num_accepted) for depth in range(max(num_accepted, default=0))
            ],
            bytes_moved=0 if has_failed else self._cost.bytes_moved(work),
            flops=0 if has_failed else self._cost.flops(work),
            num_output_tokens=sum([len(output.token_ids) for output in outputs]),
            num_first_prompt_tokens=first_prompt_tokens,
            is_queued=self._cost.is_queued,
            draft_outcome=draft_outcome,
            started_at=self.clock.started_at,
            num_prompt_tokens=work.num_prompt_tokens,
            degraded_modes=degraded_modes,
            predicted=predicted,
            prompt_limit=self._scheduler.prompt_limit,
        )


def _counters(scheduler: Scheduler) -> tuple[int, int, int, int]:
    return (
        scheduler.num_preemptions,
        scheduler.num_prefix_queries,
        scheduler.num_prefix_hits,
        scheduler.num_first_prompt_tokens,
    )
