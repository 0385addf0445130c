"""The forward pass of an EAGLE-3 head: a decoder layer over the next token's embedding and the target's states.

Li et al. 2025 (arXiv 2503.01840, section 3.1). A row stands for one token of the text: it takes that token's embedding
beside the target's states of the token before it, fused to one vector, and says what follows the token. For tokens that
are guesses, the head's own output of the row before stands in for the target's states. EAGLE 3.1 (arXiv 2605.09992)
normalises what is fused and what is fed back; P-EAGLE (arXiv 2602.01469) has learned stand-ins for tokens and states
that are not known yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.rope import RotaryEmbedding
from engine.speculation.draft_matrix import make_draft_matrix
from engine.speculation.eagle_checkpoint import EagleCheckpoint, EagleLayer, EagleWeights
from engine.speculation.eagle_config import EagleConfig
from engine.speculation.proposer import ProposerContext
from kernels.reference.rope import apply_rope


class HeadOutput(NamedTuple):
    """Of rows that were asked for. logits: [rows, draft_vocab_size] float32; states: [rows, hidden_size] for rows of
    drafts that follow them"""

    logits: Tensor
    states: Tensor


class Matrix(Protocol):
    def multiply(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]"""
        ...


class FloatMatrix:
    """A matrix in its own dtype. values: [outputs, inputs]"""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._values)


class _Linear:
    """Layers that read the same rows, as one matrix, with their biases."""

    def __init__(self, parts: list[tuple[Tensor, Tensor | None]], make_matrix: Callable[[Tensor], Matrix]) -> None:
        self._num_outputs = sum(len(weight) for weight, _ in parts)
        self._matrix = make_matrix(torch.cat([weight for weight, _ in parts]))
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        self._bias = torch.cat(biases) if any(bias is not None for _, bias in parts) else None

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self._num_outputs)
        product = self._matrix.multiply(x)
        return product if self._bias is None else product + self._bias


class _Layer:
    """One layer's matrices, ready to multiply."""

    def __init__(self, layer: EagleLayer, make_matrix: Callable[[Tensor], Matrix]) -> None:
        def linear(*names: str) -> _Linear:
            return _Linear([layer.matrices[name] for name in names], make_matrix)

        self.input_norm, self.mlp_norm = layer.input_norm, layer.mlp_norm
        self.keys_and_values = linear("self_attn.k_proj", "self_attn.v_proj")
        self.queries = linear("self_attn.q_proj")
        self.output = linear("self_attn.o_proj")
        self.gate_and_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")


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
        dtype: torch.dtype = torch.float32,
        make_matrix: Callable[[Tensor], Matrix] = FloatMatrix,
    ) -> None:
        """embedding_rows: of the head's or its target's; output: [draft_vocab_size, hidden_size]; dtype: of rows

        make_matrix: how matrices are kept
        """
        self.config, self.dtype, self.device = config, dtype, output.device
        self._embedding_rows, self._hidden_norm, self._norm_weight = embedding_rows, weights.hidden_norm, weights.norm
        self._fused_norms, self._mask_state, self._target_ids = (
            weights.fused_norms, weights.mask_state, weights.target_ids,
        )  # fmt: skip
        self._fc = None if weights.fc is None else _Linear([(weights.fc, None)], make_matrix)
        self._layers = [_Layer(layer, make_matrix) for layer in weights.layers]
        self._output = _Linear([(output, None)], make_matrix)
        self._rope = RotaryEmbedding(config.rope).to(self.device)
        self.is_parallel = weights.mask_state is not None

    @classmethod
    def load(cls, checkpoint: EagleCheckpoint, context: ProposerContext) -> EagleHead:
        """On the target's device: in the target's dtype, but on a CPU in int8 and float32, as `draft_matrix` has it."""
        is_cpu = context.device.type == "cpu"
        dtype = torch.float32 if is_cpu else context.dtype
        weights = checkpoint.read(dtype=dtype, device=context.device, keeps_matrices=is_cpu)
        output, own, size = weights.output, weights.embedding, checkpoint.config.hidden_size
        if own is None:
            found = context.embedding_rows(torch.zeros(1, dtype=torch.int64, device=context.device)).shape[1]
            if found != size:
                raise ValueError(f"the head has no embedding, and the model's has {found} features, not {size}")
        if output is None:
            output = context.output_rows(weights.target_ids).to(dtype)
        return cls(
            checkpoint.config,
            weights,
            embedding_rows=context.embedding_rows if own is None else partial(F.embedding, weight=own),
            output=output,
            dtype=dtype,
            make_matrix=make_draft_matrix if is_cpu else FloatMatrix,
        )

    def fuse(self, hidden: Tensor) -> Tensor:
        """One state of each row of the target. [n, features], as of `Model.forward` -> [n, hidden_size]"""
        size = self.config.target_hidden_size
        return self._fused((hidden[:, size:] if self.config.hidden_layers else hidden[:, :size]).to(self.dtype))

    def mask_state(self) -> Tensor:
        """What stands for states that are not known yet, of a head that drafts in one pass. [1, hidden_size]"""
        assert self._mask_state is not None
        return self._fused(self._mask_state)

    def target_ids(self, ids: Tensor) -> Tensor:
        """The target's tokens of the head's."""
        return ids if self._target_ids is None else self._target_ids[ids]

    def forward(
        self, token_ids: Tensor, states: Tensor, positions: Tensor, attention: RowAttention, wanted: Tensor | None
    ) -> HeadOutput:
        """One pass. Rows that are not wanted leave their keys and values, and nothing else is computed of them.

        token_ids, positions: [rows]; states: [rows, hidden_size]; wanted: rows, in order; None: all
        """
        config = self.config
        normed = self._norm(states, self._hidden_norm)
        residual = normed if config.norm_before_residual else states
        embedded = self._embedding_rows(token_ids).to(self.dtype)
        x = torch.cat((self._norm(embedded, self._layers[0].input_norm), normed), dim=1)
        factors = self._rope(positions, self.dtype)
        for index, layer in enumerate(self._layers):
            if index:
                x = self._norm(residual, layer.input_norm)
            rows = wanted if index == config.num_layers - 1 else None
            attended = self._attend(index, x, factors, attention, rows)
            residual = (residual if rows is None else residual[rows]) + layer.output(attended)
            gate, up = layer.gate_and_up(self._norm(residual, layer.mlp_norm)).chunk(2, dim=1)
            residual = residual + layer.down(F.silu(gate) * up)
        normed = self._norm(residual, self._norm_weight)
        logits = self._output(normed).float() * config.logit_scale
        return HeadOutput(logits, normed if config.norm_output else residual)

    def _attend(
        self, index: int, x: Tensor, factors: tuple[Tensor, Tensor], attention: RowAttention, rows: Tensor | None
    ) -> Tensor:
        """Keeps all rows' keys and values, and attends from these rows. [rows, num_heads * head_dim]"""
        layer, config = self._layers[index], self.config
        k, v = layer.keys_and_values(x).view(len(x), 2, config.num_kv_heads, config.head_dim).unbind(1)
        attention.store(index, apply_rope(k, k, *factors)[0], v)
        if rows is not None:
            x, factors = x[rows], (factors[0][rows], factors[1][rows])
        q = layer.queries(x).view(len(x), config.num_heads, config.head_dim)
        return attention.attend(index, apply_rope(q, q, *factors)[0], rows) if len(x) else q.flatten(1)

    def _fused(self, states: Tensor) -> Tensor:
        """[n, fused] -> [n, hidden_size]"""
        if self._fc is None:
            return states
        norms = self._fused_norms
        if norms:
            parts = states.chunk(len(norms), dim=1)
            states = torch.cat([self._norm(part, norm) for part, norm in zip(parts, norms, strict=True)], dim=1)
        return self._fc(states)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)
