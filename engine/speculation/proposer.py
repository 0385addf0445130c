"""Proposers: who guesses the next tokens of a sequence (speculative decoding)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from engine.config import SpeculationConfig
from engine.lazy_import import load_object
from engine.speculation.token_map import TokenMap
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sampled, Scheduled, Sequence

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerNeeds:
    """What a proposer asks of the engine, the same for all steps and known before anything is built.

    num_drafts: of one sequence that a step verifies, at most: rows of a step, for which memory is planned.
    num_lookahead_tokens: KV slots past a sequence's newest token that proposing itself writes to.
    hidden: the target's hidden states that are shown: those that newest tokens were sampled from, or of all rows.
    hidden_layers: layers whose inputs are shown beside the last hidden states.
    depth_costs_time: each draft of a run is a pass of its own, so that shallow ones are cheaper.
    num_bytes: of its weights, and of what its steps take at once; kv_bytes_per_token: of a KV cache of its own.
    """

    num_drafts: int = 0
    num_lookahead_tokens: int = 0
    hidden: Literal["none", "newest", "all"] = "none"
    hidden_layers: tuple[int, ...] = ()
    depth_costs_time: bool = False
    num_bytes: int = 0
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """The model that is proposed for, as it is known before it is loaded. path: as configured; block_size: tokens"""

    path: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerContext:
    """What a proposer may use of the model that it proposes for.

    target: its path and sizes
    output_rows: of the output layer's matrix as float32, those of some tokens [n, hidden_size], or all
    embedding_rows: of the embedding's matrix, unscaled, those of some tokens [n, hidden_size]
    open_draft_model: the model that `speculation.model` names, with a KV cache of its own
    full_group: the group of layers whose block tables keep the whole text, if there is one
    num_blocks: KV blocks of all groups, the null block included
    verifies_trees: whether a step may have trees of drafts; chains, it may always have
    device, dtype: where the target computes, and in what
    """

    target: TargetShape
    full_group: int
    num_blocks: int
    output_rows: Callable[[Tensor | None], Tensor]
    embedding_rows: Callable[[Tensor], Tensor]
    open_draft_model: Callable[[], DraftModel]
    verifies_trees: bool = True
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.target.hidden_size


class DraftModel(Protocol):
    """A second model that runs steps of its own, in the blocks that the target's sequences have.

    tokens: what its token ids are to the target; block_size: tokens of a block; num_groups: of its layers, whose block
    tables are alike; max_num_tokens: of a step
    """

    vocab_size: int
    tokens: TokenMap
    block_size: int
    num_groups: int
    max_model_len: int
    max_num_tokens: int

    def run(self, batch: list[Scheduled]) -> list[Sampled]:
        """Computes and samples a batch of its own sequences."""
        ...


class Proposer(Protocol):
    """Guesses the tokens that may follow. A wrong guess costs time, never correctness."""

    needs: ProposerNeeds

    def propose(self, step: VerifiedStep) -> None:
        """Sets the drafts (token ids and parents) of every sequence of `step.drafting`, to empty lists where it has no
        guess, and of no other; and, if it can say, its confidence in each.

        Called after the step's tokens were appended, also where none was: prompt chunks are shown as they are computed.
        Proposes no more than `draft_budget` tokens in a row, nor than `step.max_depth`, and no more than
        `needs.num_drafts` in all.
        """
        ...


def drafts_asked_for(seq: Sequence, configured: int) -> int:
    """Of a step that verifies them: what is configured, or fewer where the request asks for fewer."""
    return configured if seq.params.num_drafts is None else min(seq.params.num_drafts, configured)


def draft_budget(seq: Sequence, configured: int) -> int:
    """The longest run of drafts for a sequence: what is configured, or fewer where its request asks for fewer.

    Never more than configured, which memory and kernels were planned for. Never more than max_tokens leaves room for,
    given that the step that verifies adds a token of its own.
    """
    return max(0, min(drafts_asked_for(seq, configured), seq.params.max_tokens - seq.num_output_tokens - 1))


_NUM_DRAFTS = {"ngram": 6, "suffix": 12, "medusa": 12}  # at most, where the config does not say


def most_drafts(config: SpeculationConfig) -> int:
    """Of a sequence that a step verifies, at most. Under a controller that is a bound: it takes fewer."""
    if config.depth != "auto":
        return config.depth
    return config.num_drafts if config.num_drafts != "auto" else _NUM_DRAFTS.get(config.method, 5)


PROPOSERS = {  # speculation.method -> "module:Class"
    "none": "engine.speculation.no_proposer:NoProposer",
    "ngram": "engine.speculation.ngram:NgramProposer",
    "suffix": "engine.speculation.suffix:SuffixProposer",
    "medusa": "engine.speculation.medusa:MedusaProposer",
    "eagle3": "engine.speculation.eagle:EagleProposer",
    "eagle": "engine.speculation.eagle:EagleProposer",
    "draft_model": "engine.speculation.draft_model:DraftModelProposer",
}


class _ProposerClass(Protocol):
    def from_config(self, config: SpeculationConfig, context: ProposerContext) -> Proposer: ...

    def needs_of(self, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds: ...


def build_proposer(config: SpeculationConfig, context: ProposerContext) -> Proposer:
    """The configured proposer. Raises ValueError for a method that is not there or settings that contradict."""
    return _class_of(config).from_config(config, context)


def needs_of(config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
    """What the configured proposer will ask for, of which nothing is loaded. ValueError as `build_proposer`."""
    return _class_of(config).needs_of(config, target)


def _class_of(config: SpeculationConfig) -> _ProposerClass:
    if config.method not in PROPOSERS:
        raise ValueError(f"speculation.method is {config.method!r}, but must be one of {', '.join(PROPOSERS)}")
    return cast(_ProposerClass, load_object(PROPOSERS[config.method]))
