"""The forward pass of an EAGLE-3 head: a decoder layer over the next token's embedding and the target's states.

Li et al. 2025 (arXiv 2503.01840, section 3.1). A row stands for one token of the text: it takes that token's embedding
beside the target's states of the token before it, fused to one vector, and says what follows the token. For tokens that
are guesses, the head's own output of the row before stands in for the target's states. EAGLE 3.1 (arXiv 2605.09992)
normalises what is fused and what is fed back; P-EAGLE (arXiv 2602.01469) has learned stand-ins for tokens and states
that are not known yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.rope import RotaryEmbedding
from engine.speculation.eagle_checkpoint import EagleCheckpoint, EagleLayer, EagleWeights
from engine.speculation.eagle_config import EagleConfig
from engine.speculation.proposer import ProposerContext
from kernels.reference.rope import apply_rope


class HeadOutput(NamedTuple):
    """Of rows that were asked for. logits: [rows, draft_vocab_size] float32; states: [rows, hidden_size] for rows of
    drafts that follow them"""

    logits: Tensor
    states: Tensor


class RowAttention(Protocol):
    """Keeps the keys and values of rows, and attends to those that each row may see."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [rows, num_kv_heads, head_dim]"""
        ...

    def attend(self, layer: int, q: Tensor, rows: Tensor | None) -> Tensor:
        """rows: those that `q` has, None: all. q: [rows, num_heads, head_dim]; returns [rows, num_heads * head_dim]"""
        ...


class EagleHead:
    """Weights, and the arithmetic of one pass over any rows of any sequences."""

    def __init__(
        self,
        config: EagleConfig,
        weights: EagleWeights,
        *,
        embedding_rows: Callable[[Tensor], Tensor],
        output: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """embedding_rows: the target's, where the head has no embedding; output: [draft_vocab_size, hidden_size]"""
        self.config, self.dtype, self.device = config, dtype, output.device
        self._weights, self._embedding_rows, self._output = weights, embedding_rows, output
        self._rope = RotaryEmbedding(config.rope).to(self.device)
        self.is_parallel = weights.mask_state is not None

    @classmethod
    def load(cls, checkpoint: EagleCheckpoint, context: ProposerContext) -> EagleHead:
        """On the target's device; float32 on a CPU, whose products of fewer bits are slow, else the target's dtype."""
        dtype = torch.float32 if context.device.type == "cpu" else context.dtype
        weights = checkpoint.read(dtype=dtype, device=context.device)
        output, size = weights.output, checkpoint.config.hidden_size
        if weights.embedding is None:
            found = context.embedding_rows(torch.zeros(1, dtype=torch.int64, device=context.device)).shape[1]
            if found != size:
                raise ValueError(f"the head has no embedding, and the model's has {found} features, not {size}")
        if output is None:
            output = context.output_rows(weights.target_ids).to(context.device, dtype)
        return cls(checkpoint.config, weights, embedding_rows=context.embedding_rows, output=output, dtype=dtype)

    def fuse(self, hidden: Tensor) -> Tensor:
        """One state of each row of the target. [n, features], as of `Model.forward` -> [n, hidden_size]"""
        size = self.config.target_hidden_size
        return self._fused((hidden[:, size:] if self.config.hidden_layers else hidden[:, :size]).to(self.dtype))

    def mask_state(self) -> Tensor:
        """What stands for states that are not known yet, of a head that drafts in one pass. [1, hidden_size]"""
        assert self._weights.mask_state is not None
        return self._fused(self._weights.mask_state)

    def target_ids(self, ids: Tensor) -> Tensor:
        """The target's tokens of the head's."""
        known = self._weights.target_ids
        return ids if known is None else known[ids]

    def forward(
        self, token_ids: Tensor, states: Tensor, positions: Tensor, attention: RowAttention, wanted: Tensor | None
    ) -> HeadOutput:
        """One pass. Rows that are not wanted leave their keys and values, and nothing else is computed of them.

        token_ids, positions: [rows]; states: [rows, hidden_size]; wanted: rows, in order; None: all
        """
        config, weights = self.config, self._weights
        normed = self._norm(states, weights.hidden_norm)
        residual = normed if config.norm_before_residual else states
        x = torch.cat((self._norm(self._embed(token_ids), weights.layers[0].input_norm), normed), dim=1)
        cos, sin = self._rope(positions, self.dtype)
        for index, layer in enumerate(weights.layers):
            if index:
                x = self._norm(residual, layer.input_norm)
            rows = wanted if index == config.num_layers - 1 else None
            residual = self._layer(layer, index, (x, residual, cos, sin), attention, rows)
        normed = self._norm(residual, weights.norm)
        logits = F.linear(normed, self._output).float() * config.logit_scale
        return HeadOutput(logits, normed if config.norm_output else residual)

    def _layer(
        self,
        layer: EagleLayer,
        index: int,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        attention: RowAttention,
        rows: Tensor | None,
    ) -> Tensor:
        """The residual behind a layer, of these rows. inputs: its own, the residual, and the factors of its rotation"""
        x, residual, cos, sin = inputs
        heads = x.shape[0], -1, self.config.head_dim
        k = _linear(layer, "self_attn.k_proj", x).view(heads)
        v = _linear(layer, "self_attn.v_proj", x).view(heads)
        attention.store(index, apply_rope(k, k, cos, sin)[0], v)
        if rows is not None:
            x, residual, cos, sin = x[rows], residual[rows], cos[rows], sin[rows]
        if not x.shape[0]:
            return residual
        q = _linear(layer, "self_attn.q_proj", x).view(x.shape[0], -1, self.config.head_dim)
        attended = attention.attend(index, apply_rope(q, q, cos, sin)[0], rows)
        residual = residual + _linear(layer, "self_attn.o_proj", attended)
        x = self._norm(residual, layer.mlp_norm)
        gated = F.silu(_linear(layer, "mlp.gate_proj", x)) * _linear(layer, "mlp.up_proj", x)
        return residual + _linear(layer, "mlp.down_proj", gated)

    def _fused(self, states: Tensor) -> Tensor:
        """[n, fused] -> [n, hidden_size]"""
        weights = self._weights
        if weights.fc is None:
            return states
        norms = weights.fused_norms
        if norms:
            parts = states.chunk(len(norms), dim=1)
            states = torch.cat([self._norm(part, norm) for part, norm in zip(parts, norms, strict=True)], dim=1)
        return F.linear(states, weights.fc)

    def _embed(self, token_ids: Tensor) -> Tensor:
        own = self._weights.embedding
        rows = self._embedding_rows(token_ids) if own is None else F.embedding(token_ids, own)
        return rows.to(self.dtype)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def _linear(layer: EagleLayer, name: str, x: Tensor) -> Tensor:
    weight, bias = layer.matrices[name]
    return F.linear(x, weight, bias)
