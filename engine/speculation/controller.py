"""How many drafts a step verifies: those that are worth their rows, over all sequences, and none where none is.

Each draft has a chance to survive: to be accepted with all that it follows (`acceptance_model`). Each step has a price
by its rows (`step_costs`). The step that brings most tokens per second has the B drafts of the best chances, with B =
argmax (sequences + sum of the B chances) / (seconds of a step of so many rows + seconds of drafting). A chance never
rises along a path, so the best B drafts are whole trees from their roots.

Before anything is drafted, the same question is asked with the chances that guesses have had lately: how deep is it
worth to draft, if at all.
Where it is not, guesses are made now and then all the same, and only watched, so that better times are noticed.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from engine.arrays import Doubles
from engine.speculation.acceptance_model import Guess, Guesses, SequenceRecord, log_odds
from engine.speculation.step_costs import StepCosts
from engine.types import DraftOutcome, Sequence

MIN_GAIN = 1.02  # of tokens per second, below which drafts are not worth the doubt
_WATCH_SHARE = 0.005  # of the seconds of steps without drafts, that guesses may take which are only watched
_PAUSE = 16  # steps until it is asked again whether drafting pays
_WATCH_DEPTH = 2  # drafts in a row
_DRAFTING_PACE = 0.1  # of the running mean of what drafting costs
_MEAN_PACE = 0.1  # of the running means of survivals
_FREE = 0.01  # of a step's seconds, below which drafting costs nothing that counts


class DraftController:
    """Chooses drafts for `Speculator`, and learns from every step and every guess. Runs in the engine's thread."""

    def __init__(self, costs: StepCosts, *, max_rows: int, depth_costs_time: bool) -> None:
        """max_rows: of a step; depth_costs_time: each draft of a run is a pass of its own"""
        self.costs = costs
        self.num_chosen = 0  # drafts of the last step
        self.outcome: DraftOutcome = ""  # of the last step
        self._max_rows, self._depth_costs_time = max_rows, depth_costs_time
        self._guesses = Guesses()
        self._records: WeakKeyDictionary[Sequence, SequenceRecord] = WeakKeyDictionary()
        self._mean_survivals = 0.5 ** np.arange(1, 65)  # of a guess's drafts, from the best to the worst
        self._drafting: dict[int, float] = {}  # seconds of a pass, by the sequences' number as a power of two
        self._is_watching = False
        self._num_paused, self._paused_for = 0, 0  # steps that are left, and sequences of each
        self._plain = 0.0  # seconds of a step without drafts
        self._seconds_to_watch = self._seconds_of_watching = 0.0  # saved up; of the last time

    def judge(self, seqs: list[Sequence]) -> None:
        """Learns from the tokens that came. Call it for sequences that got some, before `depth`."""
        for seq in seqs:
            record = self._records.get(seq)
            if record is not None and record.pending:
                self._guesses.judge(seq, record)

    def depth(self, num_seqs: int, num_other_rows: int, most: int) -> int:
        """How many drafts in a row are worth drafting now for each of so many sequences; 0: none.

        num_other_rows: of the next step, beside one of each sequence
        """
        if num_seqs == 0 or most == 0:
            return 0
        if self._num_paused and self._paused_for == num_seqs:
            self._num_paused -= 1
            return self._watch_depth(most)
        seconds = self._seconds_of_pass(num_seqs)
        base = num_seqs + num_other_rows
        plain = self.costs.seconds(base)
        if seconds < _FREE * plain:
            return most
        numbers = np.arange(1, most + 1)  # of drafts of each sequence
        table = self.costs.table()
        rows = np.minimum(base + num_seqs * numbers, len(table) - 1)
        passes = numbers if self._depth_costs_time else np.ones(most)
        rates = num_seqs * (1 + self._mean_survivals[:most].cumsum()) / (table[rows] + passes * seconds)
        best = int(rates.argmax())
        if rates[best] > MIN_GAIN * num_seqs / plain:
            self._seconds_to_watch = 0.0
            return best + 1 if self._depth_costs_time else most
        self.num_chosen, self.outcome = 0, "too_slow"
        self._num_paused, self._paused_for, self._plain = _PAUSE, num_seqs, plain
        return self._watch_depth(most)

    def _watch_depth(self, most: int) -> int:
        """How deep to draft in a step where it does not pay: 0, but for a look now and then."""
        self._seconds_to_watch += _WATCH_SHARE * self._plain
        if self._seconds_to_watch < max(self._seconds_of_watching, self._seconds_of_pass(self._paused_for)):
            return 0
        self._is_watching, self._seconds_to_watch = True, 0.0
        return min(most, _WATCH_DEPTH)

    def note_drafting(self, num_seqs: int, depth: int, seconds: float, seconds_catching_up: float = 0.0) -> None:
        """What drafting took, and of what it had not kept up with beside that."""
        if self._is_watching:
            self._is_watching, self._seconds_of_watching = False, seconds + seconds_catching_up
        passes = max(depth, 1) if self._depth_costs_time else 1
        bucket = num_seqs.bit_length()
        known = self._drafting.get(bucket)
        each = seconds / passes
        if known is None:
            known = each
        pace = _DRAFTING_PACE if each > known else 0.5  # the first passes are slow, and what disturbs one slows it too
        self._drafting[bucket] = known + pace * (min(each, 4 * known) - known)

    def choose(self, seqs: list[Sequence], confidences: list[list[float]], num_other_rows: int) -> None:
        """Keeps those drafts of the sequences that are worth a row, and notes all of them as guesses.

        confidences: of each sequence's drafts, the chance that its proposer gives each after its parent; or empty
        num_other_rows: as of `depth`
        """
        survivals = [self._survivals(seq, given) for seq, given in zip(seqs, confidences, strict=True)]
        if not survivals:
            return
        together = np.concatenate(survivals)
        base = len(seqs) + num_other_rows
        most = min(len(together), max(self._max_rows - base, 0))
        order = np.argsort(-together, kind="stable")[:most]
        num_kept = self._best_number(together[order], base)
        is_kept = np.zeros(len(together), dtype=np.bool_)
        is_kept[order[:num_kept]] = True
        self.num_chosen = num_kept
        start = 0
        for seq, survival in zip(seqs, survivals, strict=True):
            if len(survival):
                _keep(seq, is_kept[start : start + len(survival)])
                start += len(survival)

    def _best_number(self, chances: Doubles, base: int) -> int:
        """How many of the drafts to verify. chances: falling; base: rows of the step without drafts"""
        if not len(chances):
            self.outcome = "no_guess"
            return 0
        table = self.costs.table()
        rows = np.minimum(base + np.arange(len(chances) + 1), len(table) - 1)
        tokens = base + np.concatenate(([0.0], chances.cumsum()))
        rates = tokens / table[rows]
        best = int(rates.argmax())
        if rates[best] > MIN_GAIN * rates[0]:
            self.outcome = "drafted"
            return best
        self.outcome = "unlikely"
        return 0

    def _survivals(self, seq: Sequence, confidences: list[float]) -> Doubles:
        """The chance of each draft to be accepted, and notes them as a guess. [drafts]"""
        parents = seq.draft_parents
        if not parents:
            return np.empty(0)
        record = self._records.get(seq)
        if record is None:
            record = self._records[seq] = SequenceRecord()
        features = np.empty((len(parents), 3))
        features[:, 0] = 1.0
        features[:, 1] = log_odds(np.array(confidences)) if confidences else 0.0
        features[:, 2] = log_odds(np.array([record.own_rate]))[0]
        depths = _depths(parents)
        chances = self._guesses.chances.chances(features, depths)
        record.pending.append(Guess(seq.num_tokens, list(seq.draft_token_ids), list(parents), features))
        survivals = np.empty(len(parents))
        for index, parent in enumerate(parents):
            survivals[index] = chances[index] * (1.0 if parent < 0 else survivals[parent])
        known = self._mean_survivals[: len(survivals)]
        known += _MEAN_PACE * (-np.sort(-survivals)[: len(known)] - known)
        return survivals

    def _seconds_of_pass(self, num_seqs: int) -> float:
        """Of drafting for so many sequences, one draft of each where depth costs time. 0: not known yet"""
        bucket = num_seqs.bit_length()
        if bucket in self._drafting:
            return self._drafting[bucket]
        return max(self._drafting.values(), default=0.0)


def _depths(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def _keep(seq: Sequence, is_kept: np.typing.NDArray[np.bool_]) -> None:
    """Leaves a sequence the drafts that are kept; of each that is, its parent is too."""
    if is_kept.all():
        return
    places = {-1: -1}
    token_ids: list[int] = []
    parents: list[int] = []
    for index in np.flatnonzero(is_kept).tolist():
        places[index] = len(token_ids)
        token_ids.append(seq.draft_token_ids[index])
        parents.append(places[seq.draft_parents[index]])
    seq.draft_token_ids, seq.draft_parents = token_ids, parents
