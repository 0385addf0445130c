"""Trees of drafts while they grow: which tokens may follow a draft, and which drafts of a tree are worth keeping."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.arrays import Floats, Ints
from engine.sampling.metadata import GREEDY_BELOW
from engine.sampling.noise import Words, gumbel, noise_bits, noise_key
from engine.types import SamplingParams, Sequence

MAX_CHILDREN = 8  # of a node
NUM_CANDIDATES = 64  # of a node, that compete with noise for being among them
MAX_OPEN_NODES = 2  # of a depth, that get children
_BEST_CHILD = 0.7  # the chance of a child, that is rarely passed


class Draft(NamedTuple):
    token_id: int
    parent: int  # -1: the newest token
    chance: float  # by its proposer, after its parent
    survival: float  # with all that it follows


def num_candidates(all_params: list[SamplingParams], max_children: int) -> int:
    """Of each node, that `likely_tokens` chooses from: with noise, also a token that is not among the likeliest."""
    is_greedy = all(params.temperature < GREEDY_BELOW for params in all_params)
    return max_children if is_greedy else NUM_CANDIDATES


def likely_tokens(
    params: SamplingParams, position: int, token_ids: Ints, log_probs: Floats, *, words: Words, most: int
) -> list[tuple[int, float]]:
    """The tokens that may stand at a position, and the chance of each, likeliest first.

    Where the request is sampled, they compete with the noise that the target will have there. None where the proposer's
    own numbers have overflowed, which is its sequence's trouble alone.

    token_ids, log_probs: [candidates], likeliest first; words: `token_words` of the vocabulary
    """
    if not np.isfinite(log_probs).all():
        return []
    if params.temperature >= GREEDY_BELOW:
        noise = gumbel(noise_bits(words[token_ids], noise_key(params.seed, position)))
        scores = log_probs / np.float32(params.temperature) + noise
        weights = np.exp(scores - scores.max())
        chances = weights / weights.sum()
        order = np.argsort(-chances, kind="stable")[:most]
    else:
        chances, order = np.exp(log_probs), np.arange(min(most, len(log_probs)))
    return [(int(token_ids[i]), float(chances[i])) for i in order]


def least_survival(tree: list[Draft], num_wanted: int) -> float:
    """Drafts that are less likely to survive need no children: so many others of the tree are likelier than those."""
    if len(tree) < num_wanted:
        return 0.0
    return sorted((draft.survival for draft in tree), reverse=True)[num_wanted - 1] / _BEST_CHILD


def set_drafts(seq: Sequence, tree: list[Draft], most: int) -> None:
    """The best drafts of a tree: of each, all that it follows are at least as good."""
    kept = sorted(sorted(range(len(tree)), key=lambda index: -tree[index].survival)[:most])
    places = {-1: -1} | {index: place for place, index in enumerate(kept)}
    seq.draft_token_ids = [tree[index].token_id for index in kept]
    seq.draft_parents = [places[tree[index].parent] for index in kept]
    seq.draft_confidences = [tree[index].chance for index in kept]
