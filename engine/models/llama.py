"""The Llama family: pre-norm decoders with rotary positions, grouped-query attention and SwiGLU.

Llama 2 and 3, Mistral, Qwen2 and Qwen3, SmolLM2 and SmolLM3, Phi-3 differ in facts (`Architecture`), not in code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.backend import AttentionBackend, HeadNorms, Rotation
from engine.batch.device_inputs import ForwardBatch
from engine.models.architecture import Architecture, read_architecture
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.model import Model, check_weight_names
from engine.models.operations import Operations
from engine.models.rope import RotaryEmbedding
from kernels.layout import PANEL


def make_linear(num_inputs: int, num_outputs: int, *, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """Not initialised: random numbers that the checkpoint overwrites take longer than the checkpoint.

    (torch's own skip_init, under a meta device, imports its symbolic algebra: half a second.)
    """
    linear = nn.Linear(num_inputs, num_outputs, bias=bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=dtype), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(torch.empty(num_outputs, dtype=dtype), requires_grad=False)
    return linear


class RMSNorm(nn.Module):
    """A normalisation's weight; the arithmetic is one of the model's operations."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, operations: Operations) -> Tensor:
        return operations.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, operations: Operations) -> tuple[Tensor, Tensor]:
        """(normalised x + residual, x + residual)"""
        return operations.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Queries, keys and values from one product; a row attends through the back end, which keeps the keys."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        a = architecture
        self.layer = layer = a.attention_layers[index]
        num_heads, num_kv_heads, head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        qkv_size = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv_proj = make_linear(a.hidden_size, qkv_size, bias=a.qkv_bias, dtype=a.dtype)
        self.o_proj = make_linear(num_heads * head_dim, a.hidden_size, bias=a.output_bias, dtype=a.dtype)
        num_normed = (num_heads, num_kv_heads) if a.qk_norm == "projection" else (1, 1)
        norms = [RMSNorm(n * head_dim, eps=a.norm_eps, dtype=a.dtype) if a.qk_norm else None for n in num_normed]
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, rotation: Rotation | None, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """x: [num_tokens, hidden_size]"""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.layer.head_dim)
        attended = attention.attend_projection(qkv, rotation, self._head_norms(), self.layer, batch)
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected

    def _head_norms(self) -> HeadNorms:
        if self.q_norm is None or self.k_norm is None:
            return HeadNorms(None, None, 0.0)
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class MLP(nn.Module):
    def __init__(self, architecture: Architecture, *, intermediate_size: int) -> None:
        super().__init__()
        a = architecture
        self.gate_up_proj = make_linear(a.hidden_size, 2 * intermediate_size, bias=a.mlp_bias, dtype=a.dtype)
        self.down_proj = make_linear(intermediate_size, a.hidden_size, bias=a.mlp_bias, dtype=a.dtype)

    def forward(self, x: Tensor, operations: Operations) -> Tensor:
        projected: Tensor = self.down_proj(operations.silu_and_mul(self.gate_up_proj(x)))
        return projected


class Block(nn.Module):
    """One layer. The residual travels beside the normalised input, so that each addition joins a normalisation."""

    def __init__(self, architecture: Architecture, index: int, mlp: nn.Module) -> None:
        super().__init__()
        a = architecture
        self.rope_index = a.rope_of_layer[index]
        self.self_attn = Attention(a, index)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)


class Llama(Model):
    """Every model of the family. Parameters carry the checkpoint's names, less a leading "model."."""

    def __init__(self, architecture: Architecture) -> None:
        a = architecture
        super().__init__(list(a.attention_layers), vocab_size=a.vocab_size, hidden_size=a.hidden_size)
        self.architecture = a
        table = torch.empty(a.vocab_size, a.hidden_size, dtype=a.dtype)
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(a, i, self.make_mlp(a, i)) for i in range(len(a.attention_layers)))
        self.norm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)
        self.lm_head = make_linear(a.hidden_size, a.vocab_size, bias=False, dtype=a.dtype)
        if a.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.ropes = nn.ModuleList(RotaryEmbedding(rope) for rope in a.ropes)
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: CheckpointConfig, *, dtype: torch.dtype, max_model_len: int | None) -> Llama:
        return cls(cls.adapt(read_architecture(config, dtype=dtype, max_model_len=max_model_len)))

    @staticmethod
    def make_mlp(architecture: Architecture, index: int) -> nn.Module:
        """What layer `index` has after its attention, called as an `MLP` is."""
        return MLP(architecture, intermediate_size=architecture.intermediate_size)

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        """Adds what only the family's name says; a variant overrides it."""
        return architecture

    @property
    def why_not_compiled(self) -> str:
        a = self.architecture
        if a.qk_norm == "projection" or not all(isinstance(block.mlp, MLP) for block in self.blocks()):
            return "experts, or norms over all heads together"
        sizes = {"hidden": a.hidden_size, "intermediate": a.intermediate_size, "head": a.attention_layers[0].head_dim}
        odd = [f"{name} size {size}" for name, size in sizes.items() if size % PANEL]
        return f"a {odd[0]}, which is no multiple of {PANEL}" if odd else ""

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        operations = self.operations
        residual = F.embedding(batch.input_ids, self.embed_tokens.weight)
        rotations: list[Rotation] = [rope(batch.positions, residual.dtype) for rope in self.ropes]
        x: Tensor | None = None  # what the last block wants added to the residual
        inputs: dict[int, Tensor] = {}  # of the layers for which somebody asks
        for index, block in enumerate(self.blocks()):
            norm, mlp_norm = block.input_layernorm, block.post_attention_layernorm
            if x is None:
                normed = norm(residual, operations)
            else:
                normed, residual = norm.add(x, residual, operations)
            if index in self.hidden_layers:
                inputs[index] = residual
            rotation = None if block.rope_index is None else rotations[block.rope_index]
            normed, residual = mlp_norm.add(block.self_attn(normed, rotation, batch, attention), residual, operations)
            x = block.mlp(normed, operations)
        assert x is not None, "a model has layers"
        normed = self.norm.add(x, residual, operations)[0]
        if not self.hidden_layers:
            return normed
        return torch.cat((normed, *(inputs[layer] for layer in self.hidden_layers)), dim=1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        destinations = dict(self._destinations())
        unexpected = []
        loaded: set[str] = set()
        for name, weight in self._one_by_one(weights):
            if name in destinations:
                _copy(name, weight, destinations[name])
                loaded.add(name)
            elif not self._is_derived(name):
                unexpected.append(name)
        check_weight_names(destinations.keys() - loaded, unexpected)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._destinations()}

    def blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def _one_by_one(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The weights under the names of `_destinations`, where checkpoints have several ways to name one."""
        return weights

    def _is_derived(self, name: str) -> bool:
        """Whether old checkpoints hold what is computed from the rest of them."""
        is_tied = self.architecture.tie_word_embeddings and name == "lm_head.weight"
        return is_tied or name.endswith("rotary_emb.inv_freq")

    def _destinations(self) -> Iterator[tuple[str, Tensor]]:
        """Where each weight of a checkpoint goes: a parameter, or the rows of a merged one."""
        for name, parameter in self.named_parameters():  # names a tied head once, as the embedding
            prefix, _, kind = name.rpartition(".")
            prefix = prefix if prefix == "lm_head" else f"model.{prefix}"
            parts = self._parts(prefix, len(parameter))
            if len(parts) == 1:
                yield f"{prefix}.{kind}", parameter.data
                continue
            parent = prefix.rpartition(".")[0]
            rows = torch.split(parameter.data, [size for _, size in parts])
            yield from ((f"{parent}.{part}.{kind}", view) for (part, _), view in zip(parts, rows, strict=True))

    def _parts(self, prefix: str, num_rows: int) -> list[tuple[str, int]]:
        """Names and numbers of rows of what a checkpoint keeps apart and we merge."""
        a, layer = self.architecture, self.architecture.attention_layers[0]
        if prefix.endswith(".qkv_proj") and not a.has_merged_weights:
            kv_size = layer.num_kv_heads * layer.head_dim
            return [("q_proj", layer.num_heads * layer.head_dim), ("k_proj", kv_size), ("v_proj", kv_size)]
        if prefix.endswith(".gate_up_proj") and not a.has_merged_weights:
            return [("gate_proj", num_rows // 2), ("up_proj", num_rows // 2)]
        return [(prefix, num_rows)]


def _copy(name: str, weight: Tensor, destination: Tensor) -> None:
    if weight.shape != destination.shape:
        shapes = f"{list(weight.shape)}, but the config asks for {list(destination.shape)}"
        raise ValueError(f"the checkpoint's {name} has shape {shapes}")
    destination.copy_(weight)
