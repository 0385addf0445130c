"""Medusa heads: guesses of the tokens after the next one, from the target's last hidden state alone.

Cai et al. 2024, arXiv 2401.10774. Beside published heads, two cheap corrections of our own training are understood,
which tell a guess what the tokens before it are: a low-rank Markov term, W2 W1[previous token], on a head's logits
(as in DeepSeek's DSpark, arXiv 2607.05147), and the same W1 row of the newest token inside of each head's block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.speculation.draft_matrix import DraftMatrix, make_draft_matrix
from engine.speculation.medusa_checkpoint import Accuracies, MedusaCheckpoint, read_medusa_checkpoint

OutputRows = Callable[[Tensor | None], Tensor]


class MedusaHeads:
    """Heads that are ready to guess. Head h guesses the token h + 1 places behind the newest one.

    Sizes: n states, k candidates, C tokens that the heads know (all of the vocabulary, or those of the token map).
    accuracies: as of `MedusaCheckpoint`
    """

    def __init__(self, checkpoint: MedusaCheckpoint, output_rows: OutputRows, *, vocab_size: int) -> None:
        """output_rows: float rows of the target's output matrix, [n, hidden_size], by token id; None: all of them"""
        device = output_rows(torch.zeros(1, dtype=torch.int64)).device
        self.num_heads = len(checkpoint.blocks)
        self.accuracies: Accuracies = checkpoint.accuracies
        self._logit_scale = checkpoint.logit_scale
        self._blocks = _Blocks(checkpoint, device)
        matrices = checkpoint.outputs or [output_rows(checkpoint.token_map)]
        self._outputs = [make_draft_matrix(matrix.to(device)) for matrix in matrices]
        self._token_map = None if checkpoint.token_map is None else checkpoint.token_map.to(device)
        self._markov = _Markov.of(checkpoint, vocab_size, device)

    @classmethod
    def load(cls, path: Path, *, hidden_size: int, vocab_size: int, output_rows: OutputRows) -> MedusaHeads:
        """Reads a directory or file of any layout that `read_medusa_checkpoint` knows; ValueError as it raises."""
        checkpoint = read_medusa_checkpoint(path, hidden_size=hidden_size, vocab_size=vocab_size)
        return cls(checkpoint, output_rows, vocab_size=vocab_size)

    @property
    def num_bytes(self) -> int:
        token_map = 0 if self._token_map is None else self._token_map.nbytes
        outputs = sum(matrix.num_bytes for matrix in self._outputs)
        return self._blocks.num_bytes + outputs + token_map + (self._markov.num_bytes if self._markov else 0)

    @property
    def num_known_tokens(self) -> int:
        return self._outputs[0].num_rows

    @property
    def has_correction(self) -> bool:
        """Whether `children` depend on the token before them."""
        return self._markov is not None

    @torch.inference_mode()
    def logits(self, hidden: Tensor, newest: Tensor) -> Tensor:
        """Scores of the tokens that the heads know, without the Markov term.

        hidden: [n, hidden_size] float32, each the state that a newest token was sampled from. newest: [n] int64
        Returns [n, num_heads, C] float32.
        """
        features = None if self._markov is None else self._markov.features(newest)
        x = self._blocks.forward(hidden, features)
        logits = self._product(x)
        return logits if self._logit_scale == 1.0 else logits * self._logit_scale

    @torch.inference_mode()
    def children(self, logits: Tensor, previous: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind `previous`, and their log-probabilities, likeliest first; [m, k] both.

        logits: [m, C] `logits(...)[:, h]` of head h, a row for each node whose children are wanted. previous: [m] int64
        the token one place before the one that head h guesses: the newest for head 0, a candidate of head h - 1 after.
        Without a Markov term they only stand in the result's shape.
        """
        scores = logits if self._markov is None else logits + self._markov.bias(previous)
        return self._best(scores, num_candidates)

    @torch.inference_mode()
    def propose(self, hidden: Tensor, newest: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of each head by itself, and their log-probabilities; [n, num_heads, k] both.

        hidden, newest: as of `logits`. The Markov term is in head 0 alone, whose previous token is the newest.
        """
        logits = self.logits(hidden, newest)
        if self._markov is not None and len(hidden):
            logits[:, 0] += self._markov.bias(newest)
        return self._best(logits, num_candidates)

    def _product(self, x: Tensor) -> Tensor:
        """[n, num_heads, hidden_size] -> [n, num_heads, C]"""
        if len(self._outputs) == 1:
            return self._outputs[0].multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:2], self.num_known_tokens)
        return torch.stack([matrix.multiply(x[:, head]) for head, matrix in enumerate(self._outputs)], dim=1)

    def _best(self, scores: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        best = scores.topk(min(num_candidates, scores.shape[-1]), dim=-1)
        log_probs = best.values - scores.logsumexp(-1, keepdim=True)
        ids = best.indices if self._token_map is None else self._token_map[best.indices]
        return ids, log_probs


class _Blocks:
    """The residual blocks of all heads. The first layers read the same states, so they are one matrix."""

    def __init__(self, checkpoint: MedusaCheckpoint, device: torch.device) -> None:
        """Heads with fewer layers than others get some of zeros, which add nothing: SiLU(0) is 0."""
        size, self._num_heads = checkpoint.hidden_size, len(checkpoint.blocks)
        none = (torch.zeros(size, size), None)
        num_layers = max(1, *(len(block) for block in checkpoint.blocks))
        layers = [
            [block[index] if index < len(block) else none for block in checkpoint.blocks] for index in range(num_layers)
        ]
        self._biases = [
            torch.stack([torch.zeros(size) if bias is None else bias.float() for _, bias in layer]).to(device)
            for layer in layers
        ]
        first = torch.cat([weight.float() for weight, _ in layers[0]])
        self._reads_newest = bool(checkpoint.newest)
        if checkpoint.newest:  # as more columns of the same matrix
            first = torch.cat((first, torch.cat(checkpoint.newest).float()), dim=1)
        self._first = make_draft_matrix(first.to(device))
        self._later = [[make_draft_matrix(weight.float().to(device)) for weight, _ in layer] for layer in layers[1:]]

    @property
    def num_bytes(self) -> int:
        matrices = [self._first, *(matrix for layer in self._later for matrix in layer)]
        return sum(matrix.num_bytes for matrix in matrices) + sum(bias.nbytes for bias in self._biases)

    def forward(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        """[n, hidden_size] -> [n, num_heads, hidden_size]. features: [n, rank] of the newest tokens"""
        reads = torch.cat((hidden, features), dim=1) if self._reads_newest and features is not None else hidden
        inner = self._first.multiply(reads)
        x = hidden[:, None] + F.silu(inner.view(-1, self._num_heads, hidden.shape[1]) + self._biases[0])
        for layer, bias in zip(self._later, self._biases[1:], strict=True):
            products = [matrix.multiply(x[:, head]) for head, matrix in enumerate(layer)]
            x = x + F.silu(torch.stack(products, dim=1) + bias)
        return x


class _Markov:
    """W1 [C + 1, rank], whose last row is of tokens that the heads do not know, and W2 [C, rank]."""

    def __init__(self, first: Tensor, second: DraftMatrix, row_of: Tensor) -> None:
        """row_of: [vocab_size] each token's row of `first`"""
        self._first, self._second, self._row_of = first, second, row_of

    @classmethod
    def of(cls, checkpoint: MedusaCheckpoint, vocab_size: int, device: torch.device) -> _Markov | None:
        if checkpoint.markov is None:
            return None
        first, second = (matrix.to(device, torch.float32) for matrix in checkpoint.markov)
        tokens = checkpoint.token_map
        if tokens is None or len(first) == vocab_size:
            row_of = torch.arange(vocab_size)
        else:
            row_of = torch.full((vocab_size,), len(first))
            row_of[tokens] = torch.arange(len(tokens))
        return cls(torch.cat((first, torch.zeros_like(first[:1]))), make_draft_matrix(second), row_of.to(device))

    @property
    def num_bytes(self) -> int:
        return self._first.nbytes + self._second.num_bytes + self._row_of.nbytes

    def features(self, tokens: Tensor) -> Tensor:
        """[m] -> [m, rank]; zero for tokens that the heads do not know"""
        return self._first[self._row_of[tokens]]

    def bias(self, previous: Tensor) -> Tensor:
        """What is added to the logits behind each token. [m] -> [m, C]"""
        return self._second.multiply(self.features(previous))
