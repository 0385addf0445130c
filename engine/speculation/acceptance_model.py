"""How likely drafts are right, learned from every guess, verified or not.

Verification is sampling: what the model says next is the same whether a draft stood there or not. So a guess that was
never verified is judged as well, by the tokens that came, and being cautious does not blind (`Guesses`).

The chance of one draft, given those before it, is an online logistic regression (`DraftChances`) on what its proposer
says of it, on how its sequence's guesses fared lately, and on its depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.types import Sequence

MAX_PENDING = 64  # guesses of a sequence that wait for their tokens
NUM_DEPTHS = 16  # told apart; deeper ones count as the last
_FARTHEST = 6.0  # log-odds
_FIRST_RATE, _LAST_RATE = 0.3, 0.01  # of learning
_OWN_PACE = 0.15  # by which a guess moves what its sequence's lately were worth
_PRIOR = 0.4  # of a sequence that nobody has guessed at


def log_odds(chance: float) -> float:
    clipped = min(max(chance, 1e-6), 1 - 1e-6)
    return min(max(math.log(clipped / (1 - clipped)), -_FARTHEST), _FARTHEST)


class DraftChances:
    """The chance that a draft is what the model says, given that its parent is.

    sigmoid(bias + a * the log-odds of the proposer's confidence, 0 where it has none + b * those of the sequence's own
    rate), with a bias, an a and a b for each depth. In Python's numbers: a step has few drafts, and numpy's calls cost
    more than their sums.
    """

    def __init__(self) -> None:
        self._weights = [[0.0, 0.5, 0.5] for _ in range(NUM_DEPTHS)]
        self._num_learned = [0] * NUM_DEPTHS

    def chance(self, confidence: float, own: float, depth: int) -> float:
        """confidence, own: log-odds; depth: from 0"""
        bias, a, b = self._weights[depth if depth < NUM_DEPTHS else -1]
        return 1.0 / (1.0 + math.exp(-(bias + a * confidence + b * own)))

    def learn(self, confidence: float, own: float, depth: int, was_right: bool) -> None:
        """Of one draft whose parent was right."""
        depth = min(depth, NUM_DEPTHS - 1)
        self._num_learned[depth] += 1
        rate = max(_FIRST_RATE / math.sqrt(self._num_learned[depth]), _LAST_RATE)
        step = rate * (was_right - self.chance(confidence, own, depth))
        weights = self._weights[depth]
        weights[0] += step
        weights[1] += step * confidence
        weights[2] += step * own


@dataclass(slots=True)
class Guess:
    """Drafts that were proposed for the tokens of a sequence from position `start` on."""

    start: int
    token_ids: list[int]
    parents: list[int]
    confidences: list[float]  # of each, log-odds; or empty
    own: float  # log-odds of the sequence's own rate then
    node: int = -1  # the last draft that was right
    depth: int = 0  # drafts that were right


@dataclass(slots=True)
class SequenceRecord:
    """What is known of one sequence's guesses: those that wait for tokens, and how they fared lately."""

    own_rate: float = _PRIOR
    pending: list[Guess] = field(default_factory=list)


class Guesses:
    """Judges guesses by the tokens that came. One for all sequences: each has a record while it lives."""

    def __init__(self) -> None:
        self.chances = DraftChances()

    def judge(self, seq: Sequence, record: SequenceRecord) -> None:
        """Follows each waiting guess along the tokens that the sequence has now."""
        waiting: list[Guess] = []
        for guess in record.pending:
            if guess.start > seq.num_tokens:  # tokens were taken back
                continue
            if self._follow(guess, seq, record):
                waiting.append(guess)
        record.pending = waiting[-MAX_PENDING:]

    def _follow(self, guess: Guess, seq: Sequence, record: SequenceRecord) -> bool:
        """Whether the guess still waits for tokens."""
        parents, num_tokens = guess.parents, seq.num_tokens
        while True:
            position, node = guess.start + guess.depth, guess.node
            if position >= num_tokens:
                return True
            token_id, right, has_children = seq.token_ids[position], -1, False
            for child in range(node + 1, len(parents)):
                if parents[child] != node:
                    continue
                has_children = True
                was_right = guess.token_ids[child] == token_id
                confidence = guess.confidences[child] if guess.confidences else 0.0
                self.chances.learn(confidence, guess.own, guess.depth, was_right)
                if was_right:
                    right = child
            if not has_children:
                return False
            record.own_rate += _OWN_PACE * ((right >= 0) - record.own_rate)
            if right < 0:
                return False
            guess.node, guess.depth = right, guess.depth + 1
