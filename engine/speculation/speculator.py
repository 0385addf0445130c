"""Speculation as the engine sees it: shows a proposer the step, and answers for what comes of it.

A proposer that raises, or proposes nonsense, costs its drafts and never a request: it is left out for a while, and for
longer each time.
"""

from __future__ import annotations

import logging
import math
import time

from torch import Tensor

from engine.circuit_breaker import CircuitBreaker
from engine.faults import check_device
from engine.speculation.controller import DraftController
from engine.speculation.proposer import Proposer
from engine.speculation.verified_step import VerifiedStep
from engine.types import DraftOutcome, Sampled, Scheduled, Sequence, StepStats

logger = logging.getLogger(__name__)


class Speculator:
    """Sets the drafts of sequences after each step. Runs in the engine's thread.

    controller: chooses how many drafts are verified; None: as many as are proposed
    is_off: whether the proposer is left out for now, because it has failed
    """

    def __init__(self, proposer: Proposer, vocab_size: int, controller: DraftController | None = None) -> None:
        self.proposer, self.controller = proposer, controller
        self._vocab_size = vocab_size
        self._breaker = CircuitBreaker(first_pause=64)
        self.outcome: DraftOutcome = ""  # of the last step

    @property
    def is_off(self) -> bool:
        return self._breaker.is_open

    def propose(self, batch: list[Scheduled], sampled: list[Sampled], hidden: Tensor | None) -> None:
        """Shows the proposer a step that is over, prompt chunks and all, if there is what it wants to see of it."""
        needs = self.proposer.needs
        self.outcome = ""
        if self.controller is not None:
            self.controller.judge([item.seq for item in batch if not item.seq.finish_reason])
        self._breaker.step()
        if self.is_off:
            self.outcome = "failed"
            return
        if needs.hidden != "none" and hidden is None:
            return
        step = VerifiedStep(batch, sampled, hidden)
        try:
            self._propose(step, batch)
        except Exception as error:  # a guess that could not be made costs time, never the request
            check_device(error)
            self._breaker.trip()
            self.outcome = "failed"
            logger.exception("the proposer failed; going on without drafts for a while")
            for seq in step.drafting:
                seq.draft_run([], [])

    def learn(self, stats: StepStats) -> None:
        """Notes what a step has cost."""
        if self.controller is not None:
            self.controller.costs.learn(stats.num_tokens, stats.forward + stats.sample)

    def _propose(self, step: VerifiedStep, batch: list[Scheduled]) -> None:
        if not self.proposer.needs.num_drafts:  # it only looks on, if that
            self.proposer.propose(step)
            return
        controller, seqs = self.controller, step.drafting
        for seq in seqs:
            seq.draft_confidences = []
        if controller is None:
            self.proposer.propose(step)
            self._check(seqs)
            if seqs:
                self.outcome = "drafted" if any(seq.draft_token_ids for seq in seqs) else "no_guess"
            return
        num_prompt_rows = sum(item.num_new_tokens for item in batch if not item.samples)
        step.max_depth = controller.depth(len(seqs), num_prompt_rows, self.proposer.needs.num_drafts)
        step.num_wanted = controller.num_wanted
        start = time.perf_counter()
        self.proposer.propose(step)
        self._check(seqs)
        if seqs and step.max_depth:
            controller.choose(seqs, [seq.draft_confidences for seq in seqs], num_prompt_rows)
            seconds, catching_up = time.perf_counter() - start, step.seconds_catching_up
            controller.note_drafting(len(seqs), step.max_depth, seconds - catching_up, catching_up)
        if seqs:
            self.outcome = controller.outcome

    def _check(self, seqs: list[Sequence]) -> None:
        """Raises ValueError for drafts that are no tree of known tokens."""
        most = self.proposer.needs.num_drafts
        for seq in seqs:
            tokens, parents = seq.draft_token_ids, seq.draft_parents
            if not tokens and not parents:
                continue
            if len(parents) != len(tokens) or len(tokens) > most:
                raise ValueError(f"{len(tokens)} drafts with {len(parents)} parents, where at most {most} are allowed")
            if min(tokens) < 0 or max(tokens) >= self._vocab_size:
                raise ValueError(f"drafts {min(tokens)} to {max(tokens)} of a vocabulary of {self._vocab_size}")
            if not all(-1 <= parent < index for index, parent in enumerate(parents)):
                raise ValueError(f"drafts whose parents do not come before them: {parents}")
            if seq.draft_confidences and len(seq.draft_confidences) != len(tokens):
                raise ValueError(f"{len(tokens)} drafts with {len(seq.draft_confidences)} confidences")
            if any(map(math.isnan, seq.draft_confidences)):  # learned once, nothing else would be known after
                raise ValueError(f"confidences that are no numbers: {seq.draft_confidences}")
