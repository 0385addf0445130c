"""Drafts of an EAGLE-3 head: a layer that goes on from what the target's own layers said of the text.

Li et al. 2025 (arXiv 2503.01840), EAGLE 3.1 (arXiv 2605.09992), P-EAGLE (arXiv 2602.01469), but for how drafts are
verified: as everywhere here, a draft is kept if it is what the target samples. Where the request is sampled, candidates
compete with the target's own noise at their positions.

After each step the head's rows of the tokens that stay are computed and kept (`eagle_cache`), prompt chunks among them:
the states that they are made of are there now and never again. They cost little, since rows that nobody asks stop at
their keys and values. Then the head guesses: one pass for each depth of a tree, or all at once, if it was made for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Floats, Ints
from engine.config import SpeculationConfig
from engine.sampling.noise import token_words
from engine.speculation.draft_tree import (
    MAX_CHILDREN,
    MAX_OPEN_NODES,
    Draft,
    likely_tokens,
    num_candidates,
    set_drafts,
)
from engine.speculation.eagle_attention import DraftContext, FirstPass, GuessRows, LaterPass, TextRows
from engine.speculation.eagle_cache import EagleCache, KnownRows, cache_bytes_per_token
from engine.speculation.eagle_checkpoint import EagleCheckpoint, open_eagle_checkpoint
from engine.speculation.eagle_head import EagleHead, HeadOutput
from engine.speculation.proposer import (
    ProposerContext,
    ProposerNeeds,
    TargetShape,
    draft_budget,
    drafts_asked_for,
    most_drafts,
)
from engine.speculation.verified_step import KeptTokens, VerifiedStep
from engine.types import Sequence

MIN_KNOWN = 0.5  # of a text, without which a head would guess at random
_BYTES, _EMBEDDING_BYTES = 2, 4  # of a weight, at most: on a CPU they are kept in int8, the embedding as in the file


@dataclass(slots=True)
class _Text:
    """A sequence of the step: rows for the tokens `first` to `end`, of states that are fused.

    depth: of its drafts, at most; 0: none are wanted
    """

    seq: Sequence
    known: KnownRows
    table: Ints
    first: int
    end: int
    states: list[Tensor]  # of the text's rows, [n, hidden_size] each, then of the newest token's
    depth: int
    context: DraftContext | None = None


class _Node(NamedTuple):
    """A draft that gets children, or the newest token."""

    draft: int  # -1: the newest token
    row: int  # of the last pass's output
    token_id: int
    survival: float
    path: list[int]  # places in the context, its own the last; of a draft whose row was not computed, its parent's


@dataclass(slots=True)
class _Tree:
    """A text's drafts while they grow."""

    text: _Text
    most: int  # drafts
    nodes: list[_Node]
    drafts: list[Draft] = field(default_factory=list)

    def is_done(self) -> bool:
        """Whether no draft of the next depth could be among the best."""
        if len(self.drafts) < self.most or not self.nodes:
            return not self.nodes
        worst = sorted((draft.survival for draft in self.drafts), reverse=True)[self.most - 1]
        return max(node.survival for node in self.nodes) <= worst


class EagleProposer:
    """Keeps the head's rows of all sequences, and grows the tree of each that is drafted for."""

    def __init__(
        self,
        head: EagleHead,
        cache: EagleCache,
        *,
        num_drafts: int,
        vocab_size: int,
        group: int = 0,
        max_children: int = MAX_CHILDREN,
        needs: ProposerNeeds | None = None,
    ) -> None:
        """group: of the target's layers, whose block tables are used; max_children: of a draft; one: they are a chain

        needs: as `needs_of` has them, sizes and all
        """
        config = head.config
        self.needs = needs or ProposerNeeds(
            num_drafts=num_drafts,
            hidden="all",
            hidden_layers=config.hidden_layers,
            depth_costs_time=not head.is_parallel,
        )
        self._head, self._cache, self._group = head, cache, group
        self._num_drafts, self._max_children = num_drafts, max_children
        self._words = token_words(vocab_size)
        self._known: WeakKeyDictionary[Sequence, KnownRows] = WeakKeyDictionary()

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> EagleProposer:
        checkpoint = _open(config, context.target)
        needs = _needs(config, checkpoint, context.target)
        head = EagleHead.load(checkpoint, context)
        cache = EagleCache(
            checkpoint.config,
            num_blocks=context.num_blocks,
            block_size=context.target.block_size,
            dtype=head.dtype,
            device=context.device,
        )
        return cls(
            head,
            cache,
            num_drafts=needs.num_drafts,
            vocab_size=context.vocab_size,
            group=context.full_group,
            max_children=MAX_CHILDREN if context.verifies_trees else 1,
            needs=needs,
        )

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        return _needs(config, _open(config, target), target)

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            seq.draft_run([], [])
        start = time.perf_counter()
        texts = [text for text in self._texts(step) if text.end > text.first or text.depth]
        if not texts:
            return
        trees, output = self._first_pass(texts)
        if sum(text.end - text.first for text in texts) > len(texts) * (self._num_drafts + 1):
            step.seconds_catching_up = time.perf_counter() - start  # prompts, which are kept whether they are drafted
        if not trees:
            return
        if self._head.is_parallel:
            self._draft_at_once(trees, output)
        else:
            self._grow_trees(trees, output)
        for tree in trees:
            set_drafts(tree.text.seq, tree.drafts, tree.most)

    def _texts(self, step: VerifiedStep) -> list[_Text]:
        """The sequences of the step with a place for their rows, and the fused states of all of them."""
        kept = [text for text in step.kept() if text.block_tables and len(text.rows) and text.first >= 0]
        if not kept:
            return []
        rows = torch.from_numpy(np.concatenate([text.rows for text in kept])).to(self._head.device)
        fused = torch.split(self._head.fuse(step.hidden()[rows]), [len(text.rows) for text in kept])
        drafting = set(map(id, step.drafting)) if step.max_depth else set()
        most = min(self._num_drafts, step.max_depth)
        return [
            self._text(text, states, draft_budget(text.seq, most) if id(text.seq) in drafting else 0)
            for text, states in zip(kept, fused, strict=True)
        ]

    def _text(self, kept: KeptTokens, fused: Tensor, depth: int) -> _Text:
        """A row takes the state of the token before its own: of the first, that is one from before the step."""
        seq, first, end = kept.seq, kept.first, kept.first + len(kept.rows)
        known, table = self._known.get(seq), np.array(kept.block_tables[self._group], dtype=np.int64)
        if known is None:
            known = self._known[seq] = KnownRows()
        known.follow(self._cache, table, seq.block_hashes, first)
        before = known.state_before(self._cache, first)
        kept_from = kept.num_released_blocks[self._group] * self._cache.block_size  # a window has passed what is before
        start = max(first + (before is None), kept_from)
        states = [fused[max(start - 1 - first, 0) : -1], fused[-1:]]
        if before is not None and start == first:
            states.insert(0, before[None].clone())
        if end > start:
            known.claim(self._cache, table, start, end)
            size = self._cache.block_size
            lasts = np.arange(start + (-start - 1) % size, end, size)  # tokens that fill a block
            if len(lasts):
                blocks = torch.from_numpy(table[lasts // size]).to(fused.device)
                self._cache.last_states[blocks] = fused[torch.from_numpy(lasts - first).to(fused.device)]
        known.state, known.state_at = fused[-1].clone(), end - 1
        num_seen = start - kept_from
        num_unknown = num_seen - (kept_from == 0) - int(known.is_known[kept_from:start].sum())
        is_drafted = depth > 0 and seq.num_tokens == end + 1 and num_unknown <= (1 - MIN_KNOWN) * num_seen
        return _Text(seq, known, table, start, end, states, depth if is_drafted else 0)

    def _first_pass(self, texts: list[_Text]) -> tuple[list[_Tree], HeadOutput]:
        """Computes and keeps the rows of the texts, and behind them those of the first guesses."""
        config = self._head.config
        token_ids: list[int] = []
        states: list[Tensor] = []
        items: list[TextRows] = []
        for text in texts:
            num_masks = text.depth - 1 if self._head.is_parallel and text.depth else 0
            num_guesses = (1 if text.depth else 0) + num_masks
            positions = np.arange(text.first, text.end + num_guesses)
            start = len(token_ids)
            token_ids += text.seq.token_ids[text.first : text.end + min(num_guesses, 1)]
            states += text.states if num_guesses else text.states[:-1]
            if num_masks:
                assert config.mask_token is not None
                token_ids += [config.mask_token] * num_masks
                states.append(self._head.mask_state().expand(num_masks, -1))
            places: list[int] = []
            if text.depth or config.num_layers > 1:
                text.context = self._context(text)
                places = text.context.add(positions[text.end - text.first :])
            items.append(TextRows(start, text.end - text.first, positions, places, text.context))
        trees = [
            _Tree(
                text, drafts_asked_for(text.seq, self._num_drafts), [_Node(-1, row, text.seq.token_ids[-1], 1.0, [0])]
            )
            for row, text in enumerate(text for text in texts if text.depth)
        ]
        output = self._run_first(texts, items, (token_ids, states))
        return trees, output

    def _run_first(
        self, texts: list[_Text], items: list[TextRows], inputs: tuple[list[int], list[Tensor]]
    ) -> HeadOutput:
        """The outputs are those of the guesses."""
        device, size = self._head.device, self._cache.block_size
        positions = np.concatenate([item.positions for item in items])
        text_rows = np.concatenate([np.arange(item.start, item.start + item.num_text) for item in items])
        guesses = np.concatenate([np.arange(item.start + item.num_text, item.end) for item in items])
        slots = np.concatenate(
            [
                text.table[np.arange(text.first, text.end) // size] * size + np.arange(text.first, text.end) % size
                for text in texts
            ]
        )
        attention = FirstPass(self._cache, items, *(torch.from_numpy(x).to(device) for x in (slots, text_rows)))
        output = self._head.forward(
            torch.tensor(inputs[0], dtype=torch.int64, device=device),
            torch.cat(inputs[1]),
            torch.from_numpy(positions).to(device),
            attention,
            torch.from_numpy(guesses).to(device),
        )
        for text in texts:
            if text.end > text.first:
                text.known.keep(self._cache, text.seq.block_hashes, text.first, text.end)
        return output

    def _context(self, text: _Text) -> DraftContext:
        is_known = text.known.is_known[: text.end].copy()
        is_known[text.first : text.end] = True  # in this pass
        most = text.depth if self._head.is_parallel else 1 + text.depth * MAX_OPEN_NODES
        window = self._head.config.window
        return DraftContext(self._cache, text.table, is_known, max_num_guesses=most, window=window)

    def _draft_at_once(self, trees: list[_Tree], output: HeadOutput) -> None:
        """A row of the pass for each draft, which knows nothing of the drafts before it: a chain."""
        nodes: list[tuple[_Tree, int, int]] = []
        row = 0
        for tree in trees:
            nodes += [(tree, row + depth, depth) for depth in range(tree.text.depth)]
            row += tree.text.depth
        ids, log_probs = self._candidates(output.logits, [tree for tree, _, _ in nodes], 1)
        for tree, index, depth in nodes:
            found = self._likely(tree.text.seq, depth, ids[index], log_probs[index], 1)
            if found and len(tree.drafts) == depth:
                token_id, chance = found[0]
                survival = chance * (tree.drafts[-1].survival if depth else 1.0)
                tree.drafts.append(Draft(token_id, depth - 1, chance, survival))

    def _grow_trees(self, trees: list[_Tree], output: HeadOutput) -> None:
        """Depth by depth, all sequences together, where the head is surest."""
        depth, growing = 0, trees
        while True:
            owners = [tree for tree in growing for _ in tree.nodes]
            ids, log_probs = self._candidates(output.logits, owners, self._max_children)
            for tree in growing:
                self._grow(tree, depth, ids, log_probs)
            depth += 1
            growing = [tree for tree in growing if depth < tree.text.depth and not tree.is_done()]
            if not growing:
                return
            output = self._later_pass(growing, output.states, depth)

    def _grow(self, tree: _Tree, depth: int, ids: Ints, log_probs: Floats) -> None:
        """Gives the nodes children, of which the best get children next."""
        grown: list[_Node] = []
        for node in tree.nodes:
            found = self._likely(tree.text.seq, depth, ids[node.row], log_probs[node.row], self._max_children)
            for token_id, chance in found:
                survival = node.survival * chance
                grown.append(_Node(len(tree.drafts), node.row, token_id, survival, node.path))
                tree.drafts.append(Draft(token_id, node.draft, chance, survival))
        tree.nodes = sorted(grown, key=lambda node: -node.survival)[:MAX_OPEN_NODES]

    def _later_pass(self, trees: list[_Tree], states: Tensor, depth: int) -> HeadOutput:
        """Rows of the drafts that get children, made of what the head itself said before them."""
        items: list[GuessRows] = []
        token_ids: list[int] = []
        rows: list[int] = []
        for tree in trees:
            context, nodes = tree.text.context, tree.nodes
            assert context is not None
            positions = np.full(len(nodes), tree.text.end + depth)
            places = context.add(positions)
            paths = [[*node.path, place] for node, place in zip(nodes, places, strict=True)]
            items.append(GuessRows(context, places, paths, positions))
            first = len(rows)
            token_ids += [node.token_id for node in nodes]
            rows += [node.row for node in nodes]
            tree.nodes = [
                node._replace(row=first + i, path=path) for i, (node, path) in enumerate(zip(nodes, paths, strict=True))
            ]
        device = self._head.device
        return self._head.forward(
            torch.tensor(token_ids, device=device),
            states[rows],
            torch.from_numpy(np.concatenate([item.positions for item in items])).to(device),
            LaterPass(items),
            None,
        )

    def _candidates(self, logits: Tensor, owners: list[_Tree], most: int) -> tuple[Ints, Floats]:
        """The likeliest tokens after each row, and their log-probabilities. owners: whose rows they are"""
        number = num_candidates([tree.text.seq.params for tree in owners], most)
        best = logits.log_softmax(-1).topk(min(number, logits.shape[1]))
        ids: Ints = self._head.target_ids(best.indices).cpu().numpy()
        log_probs: Floats = best.values.cpu().numpy()
        return ids, log_probs

    def _likely(self, seq: Sequence, depth: int, ids: Ints, log_probs: Floats, most: int) -> list[tuple[int, float]]:
        position = seq.num_tokens + depth
        return likely_tokens(seq.params, position, ids, log_probs, words=self._words, most=most)


def _open(config: SpeculationConfig, target: TargetShape) -> EagleCheckpoint:
    if config.model is None:
        raise ValueError(f"speculation.method is {config.method}: set speculation.model to the directory of a head")
    checkpoint = open_eagle_checkpoint(Path(config.model), target)
    if config.parallel_drafting not in (None, checkpoint.is_parallel):
        passes = "all drafts in one pass" if checkpoint.is_parallel else "a draft in each pass"
        given = str(config.parallel_drafting).lower()
        raise ValueError(
            f"speculation.parallel_drafting is {given}, but the head in {config.model} was made for {passes}; leave it "
            "out"
        )
    return checkpoint


def _needs(config: SpeculationConfig, checkpoint: EagleCheckpoint, target: TargetShape) -> ProposerNeeds:
    known = checkpoint.config.num_drafts
    num_in_embedding = checkpoint.num_embedding_parameters
    says_nothing = config.depth == "auto" and config.num_drafts == "auto"
    return ProposerNeeds(
        num_drafts=known if says_nothing and known is not None else most_drafts(config),
        hidden="all",
        hidden_layers=checkpoint.config.hidden_layers,
        depth_costs_time=not checkpoint.is_parallel,
        num_bytes=_BYTES * (checkpoint.num_parameters - num_in_embedding) + _EMBEDDING_BYTES * num_in_embedding,
        kv_bytes_per_token=cache_bytes_per_token(checkpoint.config, target.block_size),
    )
