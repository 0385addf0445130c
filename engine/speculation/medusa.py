"""Drafts of Medusa heads: a tree of what may follow, made from the target's last hidden state in one go.

Cai et al. 2024 (arXiv 2401.10774), but for how drafts are verified: as everywhere here, a draft is kept if it is what
the target samples ("typical acceptance" would change the output). Where the request is sampled, candidates compete with
the target's own noise at their positions, so that a guess is one of the sample, not of the distribution's peak.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.arrays import Floats, Ints
from engine.config import SpeculationConfig
from engine.sampling.noise import token_words
from engine.speculation.draft_tree import (
    MAX_CHILDREN,
    MAX_OPEN_NODES,
    Draft,
    least_survival,
    likely_tokens,
    num_candidates,
    set_drafts,
)
from engine.speculation.medusa_checkpoint import medusa_bytes
from engine.speculation.medusa_heads import MedusaHeads
from engine.speculation.proposer import (
    ProposerContext,
    ProposerNeeds,
    TargetShape,
    draft_budget,
    drafts_asked_for,
    most_drafts,
)
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sequence

SHIPPED = Path(__file__).with_name("heads")  # of models that come by name


class _Node(NamedTuple):
    """A draft of one sequence while its tree grows."""

    seq: int  # among those that are drafted for
    draft: int  # among the sequence's drafts; -1: the newest token
    token_id: int
    survival: float  # by the heads' own numbers


class MedusaProposer:
    """Grows the tree of each sequence by depth, all sequences together, where its heads are surest."""

    def __init__(
        self, heads: MedusaHeads, *, num_drafts: int, vocab_size: int, max_children: int = MAX_CHILDREN
    ) -> None:
        """max_children: of a draft; with one, drafts are a chain"""
        self.needs = _needs(num_drafts)
        self._heads, self._num_drafts, self._max_children = heads, num_drafts, max_children
        self._words = token_words(vocab_size)

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> MedusaProposer:
        heads = MedusaHeads.load(
            heads_of(config, context.target.path),
            hidden_size=context.hidden_size,
            vocab_size=context.vocab_size,
            output_rows=context.output_rows,
        )
        return cls(
            heads,
            num_drafts=most_drafts(config),
            vocab_size=context.vocab_size,
            max_children=MAX_CHILDREN if context.verifies_trees else 1,
        )

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        path = heads_of(config, target.path)
        num_bytes = medusa_bytes(path, hidden_size=target.hidden_size, vocab_size=target.vocab_size)
        return replace(_needs(most_drafts(config)), num_bytes=num_bytes)

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            seq.draft_run([], [])
        budgets = [draft_budget(seq, self._num_drafts) if step.max_depth else 0 for seq in step.drafting]
        rows = [row for row, budget in enumerate(budgets) if budget > 0]
        if not rows:
            return
        seqs = [step.drafting[row] for row in rows]
        hidden = step.newest_hidden()[rows].float()
        newest = torch.tensor([seq.token_ids[-1] for seq in seqs], device=hidden.device)
        logits = self._heads.logits(hidden, newest)
        open_nodes = [_Node(row, -1, seq.token_ids[-1], 1.0) for row, seq in enumerate(seqs)]
        depths = [min(budgets[row], self._heads.num_heads, step.max_depth) for row in rows]
        trees: list[list[Draft]] = [[] for _ in seqs]
        for depth in range(max(depths)):
            open_nodes = [node for node in open_nodes if depths[node.seq] > depth]
            if not open_nodes:
                break
            open_nodes = self._grow(seqs, trees, open_nodes, logits[:, depth], depth, step.num_wanted)
            least = [least_survival(tree, step.num_wanted) for tree in trees]
            open_nodes = [node for node in open_nodes if node.survival > least[node.seq]]
        for seq, tree in zip(seqs, trees, strict=True):
            set_drafts(seq, tree, drafts_asked_for(seq, self._num_drafts))

    def _grow(
        self,
        seqs: list[Sequence],
        trees: list[list[Draft]],
        nodes: list[_Node],
        logits: torch.Tensor,
        depth: int,
        num_wanted: int,
    ) -> list[_Node]:
        """Gives nodes children; returns those of them that get children next. logits: [sequences, tokens]"""
        previous = torch.tensor([node.token_id for node in nodes], device=logits.device)
        max_children = min(self._max_children, num_wanted)
        of_nodes = logits[[node.seq for node in nodes]]
        most = num_candidates([seqs[node.seq].params for node in nodes], max_children)
        ids, log_probs = self._heads.children(of_nodes, previous, most)
        all_ids: Ints = ids.cpu().numpy()
        all_scores: Floats = log_probs.cpu().numpy()
        grown: list[list[_Node]] = [[] for _ in seqs]
        for node, token_ids, scores in zip(nodes, all_ids, all_scores, strict=True):
            seq = seqs[node.seq]
            position = seq.num_tokens + depth
            for token_id, chance in likely_tokens(
                seq.params, position, token_ids, scores, words=self._words, most=max_children
            ):
                tree = trees[node.seq]
                survival = node.survival * chance
                grown[node.seq].append(_Node(node.seq, len(tree), token_id, survival))
                tree.append(Draft(token_id, node.draft, chance, survival))
        best = [sorted(found, key=lambda node: -node.survival)[:MAX_OPEN_NODES] for found in grown]
        return [node for found in best for node in found]


def heads_of(config: SpeculationConfig, path: str) -> Path:
    """The heads that the config names, or those that come with a model. ValueError where there are none."""
    if config.model is not None:
        return Path(config.model)
    shipped = SHIPPED / Path(path).name
    if not shipped.is_dir():
        names = ", ".join(sorted(folder.name for folder in SHIPPED.glob("*/"))) or "none"
        raise ValueError(
            f"speculation.method is medusa, but no heads come with {path} (they do with: {names}); set "
            "speculation.model to a directory of heads, which `peregrine train-heads` makes"
        )
    return shipped


def _needs(num_drafts: int) -> ProposerNeeds:
    return ProposerNeeds(num_drafts=num_drafts, hidden="newest")
