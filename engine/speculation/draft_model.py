"""Drafts of a smaller model: it decodes ahead of the target, in the same blocks and with the same noise.

Leviathan et al. 2022 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318), but for how drafts are verified: there
a draft is kept with a probability, here it is kept if it is what the target samples. Both models sample with noise
that is a function of (seed, position, token id), so that where their distributions agree they mostly choose the same
token, at any temperature, and two independent samples would not.

The draft model's KV cache has a block for each block of the target's: a sequence's block table is of both, and so is a
prefix, as far as the draft model has computed it.
"""

from __future__ import annotations

import math
import time
from itertools import takewhile
from weakref import WeakKeyDictionary

import msgspec

from engine.config import SpeculationConfig
from engine.speculation.proposer import (
    DraftModel,
    ProposerContext,
    ProposerNeeds,
    TargetShape,
    draft_budget,
    most_drafts,
)
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sampled, SamplingParams, Scheduled, Sequence


class DraftModelProposer:
    """Runs the draft model after each step, one token further in each pass, all sequences together.

    A sequence that the draft model lags behind with, as after a prompt, catches up in the rows that a step has to
    spare, and gets no drafts until it has: no first token waits for the draft model.
    """

    def __init__(self, model: DraftModel, *, num_drafts: int, group: int = 0) -> None:
        """group: of the target's layers, whose block tables are used; one that keeps whole texts, if there is one"""
        self.needs = _needs(num_drafts)
        self._model, self._num_drafts, self._group = model, num_drafts, group
        self._shadows: WeakKeyDictionary[Sequence, _Shadow] = WeakKeyDictionary()
        self._digests: dict[int, bytes] = {}  # of the text that a block holds here, if it was computed to its end

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> DraftModelProposer:
        return cls(context.open_draft_model(), num_drafts=most_drafts(config), group=context.full_group)

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        if config.model is None:
            raise ValueError("speculation.method is draft_model: set speculation.model to the path of one")
        return _needs(most_drafts(config))

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            seq.draft_run([], [])
        if not step.max_depth:
            return
        depth = min(self._num_drafts, step.max_depth)
        shadows = {
            seq: self._shadow_of(seq) for seq in step.drafting if draft_budget(seq, depth) > 0 and seq.block_tables
        }
        start = time.perf_counter()
        is_far_behind = any(shadow.num_missing > self._num_drafts + 1 for shadow in shadows.values())
        ready = self._catch_up(shadows)
        if is_far_behind:
            step.seconds_catching_up = time.perf_counter() - start
        for _ in range(depth - 1):
            ready = [(seq, shadow) for seq, shadow in ready if self._has_room(seq, shadow, depth)]
            if not ready:
                break
            self._run([(shadow, Scheduled(shadow.seq, 1, 0, samples=True)) for _, shadow in ready])
        for seq, shadow in shadows.items():
            seq.draft_run(*shadow.drafts())

    def _catch_up(self, shadows: dict[Sequence, _Shadow]) -> list[tuple[Sequence, _Shadow]]:
        """Computes what is missing of each text, those first that lack least, and samples the first draft of those that
        are complete; returns these."""
        num_left = max(self._model.max_num_tokens, len(shadows))
        items: list[tuple[_Shadow, Scheduled]] = []
        ready = []
        for seq, shadow in sorted(shadows.items(), key=lambda pair: pair[1].num_missing):
            if num_left == 0:
                break
            if shadow.seq.num_tokens >= self._model.max_model_len:
                continue
            num_new = min(shadow.num_missing, num_left)
            is_complete = num_new == shadow.num_missing
            self._forget_blocks(shadow, num_new)
            items.append((shadow, Scheduled(shadow.seq, num_new, 0, samples=is_complete)))
            num_left -= num_new
            if is_complete:
                ready.append((seq, shadow))
        self._run(items)
        for seq, shadow in shadows.items():
            self._remember_blocks(seq, shadow)
        return ready

    def _run(self, items: list[tuple[_Shadow, Scheduled]]) -> None:
        if not items:
            return
        sampled = self._model.run([item for _, item in items])
        for (shadow, item), result in zip(items, sampled, strict=True):
            shadow.seq.num_computed_tokens += item.num_new_tokens
            if item.samples:
                shadow.add(result)

    def _has_room(self, seq: Sequence, shadow: _Shadow, depth: int) -> bool:
        """Whether one draft more is wanted, and its predecessor has a place in the sequence's blocks."""
        num_drafts = shadow.num_drafts
        if shadow.has_ended or num_drafts >= draft_budget(seq, depth):
            return False
        num_slots = len(shadow.seq.block_tables[0]) * self._model.block_size
        return shadow.seq.num_tokens <= min(num_slots, self._model.max_model_len - 1)

    def _shadow_of(self, seq: Sequence) -> _Shadow:
        """What the draft model knows of a sequence, its text and blocks as they are now."""
        table = seq.block_tables[self._group]
        shadow = self._shadows.get(seq)
        if shadow is None:
            shadow = self._shadows[seq] = _Shadow(seq, self._model)
        shadow.follow(seq.token_ids)
        if not shadow.seq.block_tables or shadow.seq.block_tables[0] is not table:  # it has started, or started anew
            shadow.start(table, self._model.num_groups, min(self._num_known_tokens(seq, table), seq.num_tokens - 1))
        return shadow

    def _num_known_tokens(self, seq: Sequence, table: list[int]) -> int:
        """Of a text's beginning, those whose keys and values were computed here for another sequence."""
        pairs = zip(table, seq.block_hashes, strict=False)
        same = takewhile(lambda pair: self._digests.get(pair[0]) == pair[1], pairs)
        return sum(1 for _ in same) * self._model.block_size

    def _forget_blocks(self, shadow: _Shadow, num_new: int) -> None:
        """Blocks that are written anew."""
        size, first = self._model.block_size, shadow.seq.num_computed_tokens
        last = first + num_new + self._num_drafts
        for block in shadow.seq.block_tables[0][first // size : -(-last // size)]:
            self._digests.pop(block, None)

    def _remember_blocks(self, seq: Sequence, shadow: _Shadow) -> None:
        """Blocks that hold tokens of the target's text to their end."""
        table, hashes = shadow.seq.block_tables[0], seq.block_hashes
        num_full = min(shadow.num_verified, shadow.seq.num_computed_tokens) // self._model.block_size
        for index in range(shadow.num_remembered, min(num_full, len(hashes))):
            self._digests[table[index]] = hashes[index]
            shadow.num_remembered = index + 1


class _Shadow:
    """A sequence of the draft model: the target's text as far as it is known, and the drafts behind it.

    num_verified: tokens of `seq` that are the target's; num_remembered: blocks whose digests were noted
    """

    def __init__(self, seq: Sequence, model: DraftModel) -> None:
        params = _params_of_drafts(seq.params, model.vocab_size)
        request = msgspec.structs.replace(seq.request, params=params)
        self.seq = Sequence(request, [], num_released_blocks=[0] * model.num_groups)
        self.num_verified = self.num_remembered = 0
        self.has_ended = False
        self._model = model
        self._confidences: list[float] = []

    @property
    def num_missing(self) -> int:
        """Tokens of the text that are not in the draft model's cache, the newest among them."""
        return self.seq.num_tokens - self.seq.num_computed_tokens

    @property
    def num_drafts(self) -> int:
        return len(self._confidences)

    def drafts(self) -> tuple[list[int], list[float]]:
        """In the target's vocabulary; up to the first that it does not have."""
        to_target, drafts = self._model.tokens.to_target, self.seq.token_ids[self.num_verified :]
        if to_target:
            drafts = [to_target.get(token_id, token_id) for token_id in drafts]
        num_known = next((i for i, token_id in enumerate(drafts) if token_id < 0), len(drafts))
        return drafts[:num_known], self._confidences[:num_known]

    def start(self, table: list[int], num_groups: int, num_computed_tokens: int) -> None:
        """In these blocks, of whose text the draft model has computed so much for others."""
        self.seq.block_tables = [table] * num_groups
        self.seq.num_computed_tokens, self.num_remembered = num_computed_tokens, 0

    def follow(self, token_ids: list[int]) -> None:
        """Takes the target's text over, and keeps of its own drafts those that have become part of it."""
        known, start = self.seq.token_ids, self.num_verified
        if len(token_ids) < start:  # a step that failed has taken tokens back
            start = 0
        following = self._model.tokens.of_draft(token_ids[start:])
        num_same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known[start:], following, strict=False))
        )
        known[start + num_same :] = following[num_same:]
        self.seq.num_computed_tokens = min(self.seq.num_computed_tokens, start + num_same, len(token_ids) - 1)
        self.num_verified, self._confidences, self.has_ended = len(token_ids), [], False

    def add(self, result: Sampled) -> None:
        """The draft that was sampled, if one could be."""
        if not result.token_ids or result.error is not None:
            self.has_ended = True
            return
        self.seq.token_ids.append(result.token_ids[0])
        self._confidences.append(math.exp(result.logprobs[0].logprob) if result.logprobs else 0.5)


def _needs(num_drafts: int) -> ProposerNeeds:
    return ProposerNeeds(num_drafts=num_drafts, num_lookahead_tokens=num_drafts, depth_costs_time=True)


def _params_of_drafts(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """How drafts are chosen: as the target's tokens, but for what depends on the tokens before, which drafts are not.

    Of ids that the draft model does not have, nothing is asked of it.
    """
    allowed = params.allowed_token_ids
    if allowed is not None:
        allowed = [token_id for token_id in allowed if token_id < vocab_size] or None
    return msgspec.structs.replace(
        params,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        bad_words=[],
        logit_bias={token_id: bias for token_id, bias in params.logit_bias.items() if token_id < vocab_size},
        allowed_token_ids=allowed,
        stop_token_ids=[token_id for token_id in params.stop_token_ids if token_id < vocab_size],
        logprobs=0,
        prompt_logprobs=None,
        grammar=None,
    )
