"""Speculation as the engine sees it: shows a proposer the step, and answers for what comes of it.

A proposer that raises costs its drafts and never a request: it is left out for a while, and for longer each time.
Where it proposes nonsense for a sequence, that one gets no drafts for a while; others do, unless nonsense is all that
comes.
"""

from __future__ import annotations

import logging
import math
import time
from weakref import WeakKeyDictionary

from torch import Tensor

from engine.circuit_breaker import CircuitBreaker
from engine.faults import check_device
from engine.sampling.typical import TypicalRule
from engine.speculation.controller import DraftController
from engine.speculation.proposer import Proposer, draft_budget
from engine.speculation.verified_step import Place, VerifiedStep, places_of
from engine.structured.grammar_states import GrammarStates
from engine.types import DraftOutcome, Sampled, Scheduled, Sequence, StepStats

logger = logging.getLogger(__name__)

FIRST_PAUSE = 64  # steps
FORCED_CONFIDENCE = 0.999  # of what a mask has no other choice than; the request's own bans may forbid it
MAX_FORCED = 8  # drafts of a sequence, where nobody else proposes any
MAX_STRANGE = 4  # sequences in a row with nonsense, before the proposer itself counts as failed


class Speculator:
    """Sets the drafts of sequences after each step. Runs in the engine's thread.

    controller: chooses how many drafts are verified; None: as many as are proposed
    typical: keeps drafts that are likely enough, which is lossy; None: those that are sampled
    grammars: leave only drafts that they allow, and draft what they leave no choice about
    is_off: whether the proposer is left out for now, for everybody, because it has failed
    """

    def __init__(
        self,
        proposer: Proposer,
        vocab_size: int,
        controller: DraftController | None = None,
        *,
        typical: TypicalRule | None = None,
        grammars: GrammarStates | None = None,
    ) -> None:
        self.proposer, self.controller, self.typical = proposer, controller, typical
        self.grammars = grammars
        self.drafts_forced = True  # whether what a grammar leaves no choice about is drafted
        self._vocab_size = vocab_size
        self._breaker = CircuitBreaker(first_pause=FIRST_PAUSE)
        self._strange: WeakKeyDictionary[Sequence, CircuitBreaker] = WeakKeyDictionary()  # that had nonsense
        self._num_strange = 0  # of them, since there were drafts that made sense
        self.outcome: DraftOutcome = ""  # of the last step

    @property
    def is_off(self) -> bool:
        return self._breaker.is_open

    def places_of(self, batch: list[Scheduled]) -> list[Place] | None:
        """What `propose` is told of a step whose tokens are about to be appended; None: the proposer need not know."""
        return places_of(batch) if self.proposer.needs.hidden == "all" else None

    def propose(
        self,
        batch: list[Scheduled],
        sampled: list[Sampled],
        hidden: Tensor | None,
        *,
        places: list[Place] | None = None,
    ) -> None:
        """Shows the proposer a step that is over, prompt chunks and all, if there is what it wants to see of it."""
        needs = self.proposer.needs
        self.outcome = ""
        if self.controller is not None:
            self.controller.judge([item.seq for item in batch if not item.seq.finish_reason])
        self._breaker.step()
        left_out = [item.seq for item in batch if self._is_left_out(item.seq)] if self._strange else []
        if self.is_off:
            self.outcome = "failed"
            return
        if needs.hidden != "none" and hidden is None:
            return
        step = VerifiedStep(batch, sampled, hidden, places=places, left_out=left_out)
        try:
            self._propose(step, sum(item.num_new_tokens for item in batch if not item.samples) + len(left_out))
        except Exception as error:  # a guess that could not be made costs time, never the request
            check_device(error)
            self._breaker.trip()
            self._num_strange = 0
            self.outcome = "failed"
            logger.exception("the proposer failed; going on without drafts for a while")
            for seq in step.drafting:
                seq.draft_run([], [])

    def learn(self, stats: StepStats) -> None:
        """Notes what a step has cost."""
        if self.controller is not None:
            self.controller.costs.learn(stats.num_tokens, stats.forward + stats.sample)

    def _is_left_out(self, seq: Sequence) -> bool:
        breaker = self._strange.get(seq)
        if breaker is None:
            return False
        breaker.step()
        return breaker.is_open

    def _propose(self, step: VerifiedStep, num_other_rows: int) -> None:
        """num_other_rows: of the next step, beside those of the sequences that are drafted for"""
        if not self.proposer.needs.num_drafts:  # it only looks on, if that
            self.proposer.propose(step)
            self._draft_forced(step.drafting, MAX_FORCED)
            return
        controller, seqs = self.controller, step.drafting
        for seq in seqs:
            seq.draft_confidences = []
        if controller is None:
            self.proposer.propose(step)
            has_nonsense = self._drop_nonsense(seqs)
            self._constrain(seqs)
            self._draft_forced(seqs, self.proposer.needs.num_drafts)
            if seqs:
                self.outcome = "drafted" if _has_drafts(seqs) else "failed" if has_nonsense else "no_guess"
            return
        step.max_depth = controller.depth(len(seqs), num_other_rows, self.proposer.needs.num_drafts)
        step.num_wanted = controller.num_wanted
        start = time.perf_counter()
        self.proposer.propose(step)
        has_nonsense = self._drop_nonsense(seqs)
        is_all_nonsense = has_nonsense and not _has_drafts(seqs)
        self._constrain(seqs)
        if seqs and step.max_depth:
            controller.choose(seqs, [seq.draft_confidences for seq in seqs], num_other_rows)
            seconds, catching_up = time.perf_counter() - start, step.seconds_catching_up
            controller.note_drafting(len(seqs), step.max_depth, seconds - catching_up, catching_up)
        if seqs:
            self.outcome = "failed" if is_all_nonsense else controller.outcome
        self._draft_forced(seqs, self.proposer.needs.num_drafts)

    def _constrain(self, seqs: list[Sequence]) -> None:
        """Leaves only drafts that grammars allow."""
        if self.grammars is not None:
            self.grammars.constrain(seqs)

    def _draft_forced(self, seqs: list[Sequence], most: int) -> None:
        """Drafts the tokens that a grammar leaves no choice about, unless they are drafted already.

        They pay whatever a controller says: a row that is computed now is one less in a step of its own.
        """
        if self.grammars is None or not self.drafts_forced or not self.grammars.has_any:
            return
        for seq in seqs:
            budget = draft_budget(seq, most)
            forced = self.grammars.forced(seq)[:budget] if budget > 0 else []
            if forced and not _begins_with(seq, forced):
                seq.draft_run(forced, [FORCED_CONFIDENCE] * len(forced))

    def _drop_nonsense(self, seqs: list[Sequence]) -> bool:
        """Takes drafts that make no sense from their sequences, and says whether there were any.

        ValueError where it is many sequences, and nothing in between made sense.
        """
        found = [(seq, reason) for seq in seqs if (reason := self._nonsense(seq))]
        for seq, _ in found:
            seq.draft_run([], [])
        for seq, reason in found:
            breaker = self._strange.get(seq)
            if breaker is None:
                breaker = self._strange[seq] = CircuitBreaker(first_pause=FIRST_PAUSE)
                self._num_strange += 1
            breaker.trip()
            logger.warning("request %s gets no drafts for a while: %s", seq.request.request_id, reason)
        if _has_drafts(seqs):
            self._num_strange = 0
        if self._num_strange >= MAX_STRANGE:
            raise ValueError(f"{self._num_strange} requests in a row had nonsense for drafts, the last: {found[-1][1]}")
        return bool(found)

    def _nonsense(self, seq: Sequence) -> str:
        """What is wrong with drafts that are no tree of known tokens; empty if nothing is."""
        tokens, parents, most = seq.draft_token_ids, seq.draft_parents, self.proposer.needs.num_drafts
        if not tokens and not parents:
            return ""
        if len(parents) != len(tokens) or len(tokens) > most:
            return f"{len(tokens)} drafts with {len(parents)} parents, where at most {most} are allowed"
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            return f"drafts {min(tokens)} to {max(tokens)} of a vocabulary of {self._vocab_size}"
        if not all(-1 <= parent < index for index, parent in enumerate(parents)):
            return f"drafts whose parents do not come before them: {parents}"
        if seq.draft_confidences and len(seq.draft_confidences) != len(tokens):
            return f"{len(tokens)} drafts with {len(seq.draft_confidences)} confidences"
        if any(map(math.isnan, seq.draft_confidences)):  # learned once, nothing else would be known after
            return f"confidences that are no numbers: {seq.draft_confidences}"
        return ""


def _begins_with(seq: Sequence, token_ids: list[int]) -> bool:
    """Whether these tokens are a path of the sequence's drafts from the root."""
    node = -1
    for token_id in token_ids:
        children = range(node + 1, len(seq.draft_token_ids))
        found = [i for i in children if seq.draft_parents[i] == node and seq.draft_token_ids[i] == token_id]
        if not found:
            return False
        node = found[0]
    return True


def _has_drafts(seqs: list[Sequence]) -> bool:
    return any(seq.draft_token_ids for seq in seqs)
