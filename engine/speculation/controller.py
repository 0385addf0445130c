"""How many drafts a step verifies: those that are worth their rows, over all sequences, and none where none is.

Each draft has a chance to survive: to be accepted with all that it follows (`acceptance_model`). Each step has a price
by its rows (`step_costs`). The step that brings most tokens per second has the B drafts of the best chances, with B =
argmax (sequences + sum of the B chances) / (seconds of a step of so many rows + seconds of drafting). A chance never
rises along a path, so the best B drafts are whole trees from their roots.

Before anything is drafted: do drafts lately gain more seconds than guessing takes, judging and choosing included? Where
each draft of a run costs a pass of its own, how deep is it worth to draft, by the chances that guesses have had lately?
Where it is not worth it, guesses are made now and then all the same, so that better times are noticed.
"""

from __future__ import annotations

import math
import time
from itertools import accumulate
from weakref import WeakKeyDictionary

from engine.speculation.acceptance_model import Guess, Guesses, SequenceRecord, log_odds
from engine.speculation.step_costs import StepCosts
from engine.types import DraftOutcome, Sequence

MIN_GAIN = 1.02  # of tokens per second, below which drafts are not worth the doubt
_WATCH_SHARE = 0.005  # of the seconds of steps without drafts, that guesses may take which are only watched
_PAUSE = 16  # steps until it is asked again whether drafting pays
_WATCH_DEPTH = 2  # drafts in a row, where depth costs time
_DRAFTING_PACE = 0.1  # of the running mean of what drafting costs
_MEAN_PACE = 0.1  # of the running means of survivals and gains
_WANTED_PACE = 0.05  # by which it is forgotten that more drafts of a sequence were worth a row
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
        self._mean_survivals = [0.5**i for i in range(1, 65)]  # of a guess's drafts, from the best to the worst
        self._mean_gain = 1.0  # of a step by its drafts, in steps without any
        self._drafting: dict[int, float] = {}  # seconds of a pass, by the sequences' number as a power of two
        self._seconds_of_judging = 0.0
        self._num_wanted = 8.0
        self._is_watching = False
        self._num_paused, self._paused_for = 0, 0  # steps that are left, and sequences of each
        self._plain = 0.0  # seconds of a step without drafts
        self._seconds_to_watch = self._seconds_of_watching = 0.0  # saved up; of the last time

    def judge(self, seqs: list[Sequence]) -> None:
        """Learns from the tokens that came. Call it for sequences that got some, before `depth`."""
        start = time.perf_counter()
        for seq in seqs:
            record = self._records.get(seq)
            if record is not None and record.pending:
                self._guesses.judge(seq, record)
        self._seconds_of_judging = time.perf_counter() - start

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
        plain = self.costs.seconds(num_seqs + num_other_rows)
        if seconds < _FREE * plain:
            return most
        if self._depth_costs_time:
            depth = self._best_depth(num_seqs, num_other_rows, most, seconds / self.costs.scale)
        else:
            depth = most if self._mean_gain * plain > seconds else 0
        if depth:
            self._seconds_to_watch = 0.0
            return depth
        self.num_chosen, self.outcome = 0, "too_slow"
        self._num_paused, self._paused_for, self._plain = _PAUSE, num_seqs, plain
        return self._watch_depth(most)

    @property
    def num_wanted(self) -> int:
        """How many drafts of a sequence may be worth a row, by what was kept lately: more need not be made."""
        return math.ceil(self._num_wanted)

    def _best_depth(self, num_seqs: int, num_other_rows: int, most: int, pass_cost: float) -> int:
        """How many passes to draft in. pass_cost: in units of the table of costs"""
        table, base = self.costs.table(), num_seqs + num_other_rows
        least = MIN_GAIN * num_seqs / table[min(base, len(table) - 1)]
        best = 0
        for number, survivals in enumerate(accumulate(self._mean_survivals[:most]), 1):
            cost = table[min(base + num_seqs * number, len(table) - 1)] + number * pass_cost
            rate = num_seqs * (1 + survivals) / cost
            if rate > least:
                best, least = number, rate
        return best

    def _watch_depth(self, most: int) -> int:
        """How deep to draft in a step where it does not pay: 0, but for a look now and then."""
        self._seconds_to_watch += _WATCH_SHARE * self._plain
        if self._seconds_to_watch < max(self._seconds_of_watching, self._seconds_of_pass(self._paused_for)):
            return 0
        self._is_watching, self._seconds_to_watch = True, 0.0
        return min(most, _WATCH_DEPTH) if self._depth_costs_time else most

    def note_drafting(self, num_seqs: int, depth: int, seconds: float, seconds_catching_up: float = 0.0) -> None:
        """What drafting and choosing took, and of what the proposer had not kept up with beside that."""
        seconds += self._seconds_of_judging
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
        together = [survival for ones in survivals for survival in ones]
        base = len(seqs) + num_other_rows
        most = min(len(together), max(self._max_rows - base, 0))
        order = sorted(range(len(together)), key=together.__getitem__, reverse=True)[:most]  # of equals, the first
        num_kept = self._best_number([together[index] for index in order], base)
        self.num_chosen = num_kept
        kept = set(order[:num_kept])
        start = most_kept = 0
        for seq, ones in zip(seqs, survivals, strict=True):
            if ones:
                indices = [index for index in range(len(ones)) if start + index in kept]
                most_kept = max(most_kept, len(indices))
                seq.keep_drafts(indices)
                start += len(ones)
        if most_kept >= self.num_wanted:
            self._num_wanted = 2.0 * most_kept
        else:
            self._num_wanted += _WANTED_PACE * (most_kept + 1 - self._num_wanted)

    def _best_number(self, chances: list[float], base: int) -> int:
        """How many of the drafts to verify. chances: falling; base: rows of the step without drafts"""
        table = self.costs.table()
        last = len(table) - 1
        plain = table[min(base, last)]
        best, best_rate, gain = 0, MIN_GAIN * base / plain, 0.0
        tokens = float(base)
        for number, chance in enumerate(chances, 1):
            tokens += chance
            cost = table[min(base + number, last)]
            if tokens / cost > best_rate:
                best, best_rate, gain = number, tokens / cost, tokens / base - cost / plain
        self._mean_gain += _MEAN_PACE * (gain - self._mean_gain)
        self.outcome = "drafted" if best else "unlikely" if chances else "no_guess"
        return best

    def _survivals(self, seq: Sequence, confidences: list[float]) -> list[float]:
        """The chance of each draft to be accepted, and notes them as a guess. [drafts]"""
        parents = seq.draft_parents
        if not parents:
            return []
        record = self._records.get(seq)
        if record is None:
            record = self._records[seq] = SequenceRecord()
        own, odds = log_odds(record.own_rate), list(map(log_odds, confidences))
        record.pending.append(Guess(seq.num_tokens, list(seq.draft_token_ids), list(parents), odds, own))
        depths: list[int] = []
        survivals: list[float] = []
        for index, parent in enumerate(parents):
            depth, survival = (0, 1.0) if parent < 0 else (depths[parent] + 1, survivals[parent])
            depths.append(depth)
            survivals.append(survival * self._guesses.chances.chance(odds[index] if odds else 0.0, own, depth))
        if self._depth_costs_time:
            for place, survival in enumerate(sorted(survivals, reverse=True)):
                self._mean_survivals[place] += _MEAN_PACE * (survival - self._mean_survivals[place])
        return survivals

    def _seconds_of_pass(self, num_seqs: int) -> float:
        """Of drafting for so many sequences, one draft of each where depth costs time. 0: not known yet"""
        bucket = num_seqs.bit_length()
        if bucket in self._drafting:
            return self._drafting[bucket]
        return max(self._drafting.values(), default=0.0)
