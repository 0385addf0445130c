"""A hundred thousand tokens with drafts, good, bad or malicious, against the distribution that they must have.

A G-test of each token given the one before it, on a language of which the whole distribution is known. The threshold is
a probability of 1e-4 for each test under the exact distribution, of seeds that are fixed: each passes or fails always.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.arrays import Doubles, Ints
from engine.batch.step_inputs import StepInputs
from engine.engine import Engine
from engine.kv_cache.manager import KVCacheManager
from engine.runner.executor import InFlightStep, StepResult
from engine.sampling.host_sampler import HostSampler
from engine.sampling.noise import Words, gumbel, noise_bits, noise_keys, token_words
from engine.sampling.numba_sampler import NumbaSampler
from engine.sampling.sampler import TokenSampler
from engine.sampling.typical import TypicalRule
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.proposer import ProposerNeeds, draft_budget
from engine.speculation.speculator import Speculator
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, SamplingParams
from tests.support.tiny_llamas import COST

VOCAB, DEPTH, WIDTH = 12, 4, 3
NUM_REQUESTS, LENGTH = 500, 200
NUM_TOKENS = NUM_REQUESTS * LENGTH
FARTHEST = 3.72  # standard deviations of a normal variable: beyond with a probability of 1e-4
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5  # of what follows each token
PARAMS = {"plain": {"temperature": 1.0}, "nucleus": {"temperature": 0.8, "top_p": 0.85}}


def exact(*, temperature: float = 1.0, top_p: float = 1.0) -> Doubles:
    """The distribution after each token, by its definition. [VOCAB, VOCAB]"""
    scores = LOGITS.double().numpy() / temperature
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    for row in chances:
        order = np.argsort(-row, kind="stable")
        row[order[(row[order].cumsum() - row[order]) >= top_p]] = 0.0
    return chances / chances.sum(1, keepdims=True)


class Language:
    """An executor whose model knows the newest token alone."""

    keeps_token_counts = lacks_graphs = False
    vocab_size = VOCAB

    def __init__(self, sampler: TokenSampler) -> None:
        self._sampler = sampler

    def launch(self, inputs: StepInputs, newest: Tensor | None = None) -> InFlightStep:
        logits = LOGITS[torch.from_numpy(inputs.input_ids[inputs.logits_rows])]
        output = self._sampler.launch(logits, inputs.sampling, newest)
        return InFlightStep(inputs, output, torch.empty(0), lambda inputs, sampled: None)

    def run(self, inputs: StepInputs) -> StepResult:
        return self.launch(inputs).finish()

    def release_memory(self) -> None:
        pass


class Drafter:
    """Drafts for all sequences at once, and may look at everything: chains, and siblings of their first draft."""

    needs = ProposerNeeds(num_drafts=DEPTH + WIDTH - 1)

    def __init__(self, kind: str, *, is_tree: bool) -> None:
        self._kind, self._width = kind, WIDTH if is_tree else 1
        self._rng, self._chances, self._words = np.random.default_rng(0), exact(), token_words(VOCAB)

    def propose(self, step: VerifiedStep) -> None:
        seqs = step.drafting
        seeds = np.array([seq.params.seed for seq in seqs], dtype=np.uint64)
        ends = np.array([seq.num_tokens for seq in seqs], dtype=np.int64)
        tokens: Ints = np.array([seq.token_ids[-1] for seq in seqs], dtype=np.int64)
        levels = []
        for depth in range(DEPTH):
            found = self._guesses(tokens, noise_keys(seeds, ends + depth))
            levels.append(found[:, : 1 if depth else self._width])
            tokens = found[:, 0]
        rows = np.concatenate(levels, axis=1).tolist()
        parents = [-1] * self._width + [0, *range(self._width, self._width + DEPTH - 2)]
        for seq, token_ids in zip(seqs, rows, strict=True):
            budget = draft_budget(seq, DEPTH)
            number = budget + self._width - 1 if budget else 0
            seq.draft_token_ids, seq.draft_parents = token_ids[:number], parents[:number]

    def _guesses(self, tokens: Ints, keys: Words) -> Ints:
        """What may follow each token, the first of them first. [n] -> [n, VOCAB]; keys: of the noise there, [n, 2]"""
        log_chances = np.log(self._chances[tokens])
        if self._kind == "good":  # a sample of the target's own distribution
            return np.argsort(-log_chances - self._rng.gumbel(size=log_chances.shape), axis=1)
        if self._kind == "bad":  # the least likely
            return np.argsort(log_chances, axis=1)
        # It knows what will be sampled, and drafts that where it likes it, and where not, anything else: whoever kept
        # drafts for their own sake, or drew anew where one was wrong, would say what it likes.
        noise = gumbel(noise_bits(self._words[None], (keys[:, :1], keys[:, 1:])))  # type: ignore[arg-type]
        known = (log_chances + noise).argmax(1)
        return (known[:, None] + (known % 2)[:, None] + np.arange(VOCAB)) % VOCAB


def sampled_pairs(
    kind: str,
    *,
    is_tree: bool,
    params: dict[str, float],
    sampler: TokenSampler,
    seed: int,
    typical: TypicalRule | None = None,
) -> tuple[Doubles, float]:
    """How often each token came after each. [VOCAB, VOCAB]; and how many drafts were accepted in a step, on average"""
    limits = SchedulerLimits(
        max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=8 * NUM_REQUESTS, max_model_len=LENGTH + 9
    )
    scheduler = Scheduler(KVCacheManager(NUM_REQUESTS * 16 + 1, 16, prefix_caching=False), limits)
    speculator = Speculator(Drafter(kind, is_tree=is_tree), VOCAB, typical=typical)
    engine = Engine(Language(sampler), scheduler, speculator, COST)
    texts: dict[str, list[int]] = {}
    for index in range(NUM_REQUESTS):
        name, prompt = str(index), [index % VOCAB]
        texts[name] = list(prompt)
        one = SamplingParams(seed=seed * NUM_REQUESTS + index, max_tokens=LENGTH, **params)
        engine.add(Request(request_id=name, prompt_token_ids=prompt, params=one))
    num_accepted = num_steps = 0
    while engine.has_work:
        outputs, _, stats = engine.step()
        num_accepted, num_steps = num_accepted + sum(stats.accepted_by_position), num_steps + stats.num_drafts
        for output in outputs:
            assert output.error is None
            texts[output.request_id] += output.token_ids
    counts = np.zeros((VOCAB, VOCAB))
    for text in texts.values():
        np.add.at(counts, (text[:-1], text[1:]), 1)
    return counts, num_accepted / num_steps


def distance(counts: Doubles, chances: Doubles) -> float:
    """Of counts from what they should be: the G statistic, as the normal variable that it nearly is.

    Wilson and Hilferty's cube root.
    """
    expected = counts.sum(1, keepdims=True) * chances
    assert counts.sum() == NUM_TOKENS
    if counts[chances == 0].any():
        return math.inf
    seen = counts > 0
    statistic = 2 * (counts[seen] * np.log(counts[seen] / expected[seen])).sum()
    degrees = int((chances > 0).sum() - VOCAB)
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


QUICK = {
    ("good", "chain", "plain"),
    ("good", "tree", "nucleus"),
    ("bad", "tree", "plain"),
    ("adversarial", "chain", "nucleus"),
    ("adversarial", "tree", "plain"),
}
CASES = [
    pytest.param(kind, shape == "tree", params, sampler, marks=[] if is_quick else [pytest.mark.slow])
    for kind, shape, params in product(("good", "bad", "adversarial"), ("chain", "tree"), PARAMS)
    for sampler in (NumbaSampler, HostSampler)
    for is_quick in [sampler is NumbaSampler and (kind, shape, params) in QUICK]
]


@pytest.mark.parametrize(("kind", "is_tree", "params", "sampler"), CASES)
def test_tokens_have_the_distribution_of_the_target_whoever_drafts(
    kind: str, is_tree: bool, params: str, sampler: type[HostSampler]
) -> None:
    counts, accepted = sampled_pairs(kind, is_tree=is_tree, params=PARAMS[params], sampler=sampler(VOCAB), seed=1)
    assert distance(counts, exact(**PARAMS[params])) < FARTHEST
    assert accepted > 0.2 or kind == "bad"


def test_the_test_finds_a_distribution_that_is_off_by_little() -> None:
    """Two hundredths, taken from each row's likeliest token and given to the next one."""
    counts, _ = sampled_pairs("good", is_tree=False, params=PARAMS["plain"], sampler=NumbaSampler(VOCAB), seed=2)
    chances = exact()
    for row in chances:
        first, second = np.argsort(-row)[:2]
        row[first], row[second] = row[first] - 0.02, row[second] + 0.02
    assert distance(counts, exact()) < FARTHEST < distance(counts, chances)


def test_typical_acceptance_is_found_to_be_lossy() -> None:
    """Which is why it is off by default: the same test, the same drafts, and a rule that keeps more of them."""
    found = [
        sampled_pairs(
            "good", is_tree=True, params=PARAMS["plain"], sampler=NumbaSampler(VOCAB), seed=3, typical=typical
        )
        for typical in (None, TypicalRule(0.09, 0.3))
    ]
    distances = [distance(counts, exact()) for counts, _ in found]
    assert distances[0] < FARTHEST < 10 * FARTHEST < distances[1]
    assert found[0][1] < found[1][1]
