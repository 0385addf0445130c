"""How likely drafts are right, learned from every guess, verified or not.

Verification is sampling: what the model says next is the same whether a draft stood there or not. So a guess that was
never verified is judged as well, by the tokens that came, and being cautious does not blind (`Guesses`).

The chance of one draft, given those before it, is an online logistic regression (`DraftChances`) on what its proposer
says of it, on how its sequence's guesses fared lately, and on its depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import numpy as np

from engine.arrays import Doubles
from engine.types import Sequence

MAX_PENDING = 64  # guesses of a sequence that wait for their tokens
NUM_DEPTHS = 16  # told apart; deeper ones count as the last
_FARTHEST = 6.0  # log-odds
_FIRST_RATE, _LAST_RATE = 0.3, 0.01  # of learning
_OWN_PACE = 0.15  # by which a guess moves what its sequence's lately were worth
_PRIOR = 0.4  # of a sequence that nobody has guessed at


def log_odds(chances: Doubles) -> Doubles:
    clipped = np.clip(chances, 1e-6, 1 - 1e-6)
    odds: Doubles = np.clip(np.log(clipped / (1 - clipped)), -_FARTHEST, _FARTHEST)
    return odds


class DraftChances:
    """The chance that a draft is what the model says, given that its parent is: sigmoid(weights . features).

    Features: 1, the log-odds of the proposer's confidence (0 where it has none), those of the sequence's own rate.
    Each depth has weights of its own.
    """

    NUM_FEATURES = 3

    def __init__(self) -> None:
        self._weights = np.tile(np.array([0.0, 0.5, 0.5]), (NUM_DEPTHS, 1))
        self._num_learned = np.zeros(NUM_DEPTHS, dtype=np.int64)

    def chances(self, features: Doubles, depths: Listing[int]) -> Doubles:
        """features: [n, NUM_FEATURES]; depths: [n], from 0. [n]"""
        rows = self._weights[np.minimum(depths, NUM_DEPTHS - 1)]
        chances: Doubles = 1.0 / (1.0 + np.exp(-np.einsum("nf,nf->n", rows, features)))
        return chances

    def learn(self, features: Doubles, depth: int, was_right: bool) -> None:
        """features: [NUM_FEATURES] of one draft whose parent was right"""
        depth = min(depth, NUM_DEPTHS - 1)
        weights = self._weights[depth]
        chance = 1.0 / (1.0 + math.exp(-float(weights @ features)))
        self._num_learned[depth] += 1
        rate = max(_FIRST_RATE / math.sqrt(self._num_learned[depth]), _LAST_RATE)
        weights += rate * (was_right - chance) * features


@dataclass(slots=True)
class Guess:
    """Drafts that were proposed for the tokens of a sequence from position `start` on. features: [n, NUM_FEATURES]"""

    start: int
    token_ids: list[int]
    parents: list[int]
    features: Doubles
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
        while True:
            position = guess.start + guess.depth
            if position >= seq.num_tokens:
                return True
            children = [i for i, parent in enumerate(guess.parents) if parent == guess.node and i > guess.node]
            if not children:
                return False
            token_id, right = seq.token_ids[position], -1
            for child in children:
                was_right = guess.token_ids[child] == token_id
                self.chances.learn(guess.features[child], guess.depth, was_right)
                if was_right:
                    right = child
            record.own_rate += _OWN_PACE * ((right >= 0) - record.own_rate)
            if right < 0:
                return False
            guess.node, guess.depth = right, guess.depth + 1
