"""The Llama family: pre-norm decoders with rotary positions, grouped-query attention and SwiGLU.

Llama 2 and 3, Mistral, Qwen2 and Qwen3, SmolLM2 and SmolLM3, Phi-3 differ in facts (`Architecture`), not in code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.backend import AttentionBackend, HeadNorms, Rotation
from engine.batch.device_inputs import ForwardBatch
from engine.models.architecture import Architecture, read_architecture
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.model import Model, Place, check_weight_names, is_kv_scale
from engine.models.operations import Operations
from engine.models.rope import RotaryEmbedding
from engine.quantization.linear import PLAIN, KeptMatrix, Linear, LinearMethods, LinearSpec, Part, Table
from engine.quantization.stored_levels import StoredLevels, as_floats
from kernels.layout import MAX_ROTATIONS, PANEL


def make_linear(spec: LinearSpec, methods: LinearMethods, *, bias: bool, dtype: torch.dtype) -> Linear:
    """A layer that keeps its matrix by the method that is chosen for it."""
    return Linear(spec, methods.of(spec, dtype), bias=bias, dtype=dtype)


class TokenTable(nn.Embedding):
    """The embedding: floats, or what compiled layers look rows up in, and then `weight` is empty."""

    table: Table | None = None

    def keep(self, table: Table) -> None:
        self.table = table
        self.weight = nn.Parameter(self.weight.data[:0].clone(), requires_grad=False)

    def rows(self, token_ids: Tensor) -> Tensor:
        """[n] -> [n, hidden_size]"""
        return F.embedding(token_ids, self.weight) if self.table is None else self.table.rows(token_ids)


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

    def __init__(self, architecture: Architecture, index: int, methods: LinearMethods) -> None:
        super().__init__()
        a = architecture
        self.layer = layer = a.attention_layers[index]
        num_heads, num_kv_heads, head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        sizes = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        qkv = LinearSpec(a.hidden_size, merged_parts(a, sizes), axis="outputs")
        out = LinearSpec(num_heads * head_dim, (Part("", a.hidden_size),), axis="inputs")
        self.qkv_proj = make_linear(qkv, methods, bias=a.qkv_bias, dtype=a.dtype)
        self.o_proj = make_linear(out, methods, bias=a.output_bias, dtype=a.dtype)
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
    def __init__(self, architecture: Architecture, methods: LinearMethods, *, intermediate_size: int) -> None:
        super().__init__()
        a, sizes = architecture, {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        gate_up = LinearSpec(a.hidden_size, merged_parts(a, sizes), axis="outputs")
        down = LinearSpec(intermediate_size, (Part("", a.hidden_size),), axis="inputs")
        self.gate_up_proj = make_linear(gate_up, methods, bias=a.mlp_bias, dtype=a.dtype)
        self.down_proj = make_linear(down, methods, bias=a.mlp_bias, dtype=a.dtype)

    def forward(self, x: Tensor, operations: Operations) -> Tensor:
        projected: Tensor = self.down_proj(operations.silu_and_mul(self.gate_up_proj(x)))
        return projected


class Block(nn.Module):
    """One layer. The residual travels beside the normalised input, so that each addition joins a normalisation."""

    def __init__(self, architecture: Architecture, index: int, mlp: nn.Module, methods: LinearMethods) -> None:
        super().__init__()
        a = architecture
        self.rope_index = a.rope_of_layer[index]
        self.self_attn = Attention(a, index, methods)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)


class Llama(Model):
    """Every model of the family. Parameters carry the checkpoint's names, less a leading "model."."""

    def __init__(self, architecture: Architecture, methods: LinearMethods) -> None:
        a = architecture
        super().__init__(list(a.attention_layers), vocab_size=a.vocab_size, hidden_size=a.hidden_size)
        self.architecture, self.methods = a, methods
        table = torch.empty(a.vocab_size, a.hidden_size, dtype=a.dtype)
        self.embed_tokens = TokenTable(a.vocab_size, a.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            Block(a, i, self.make_mlp(a, i, methods), methods) for i in range(len(a.attention_layers))
        )
        self.norm = RMSNorm(a.hidden_size, eps=a.norm_eps, dtype=a.dtype)
        output = LinearSpec(a.hidden_size, (Part("", a.vocab_size),), axis="outputs", is_output=True)
        self.lm_head = make_linear(output, methods, bias=False, dtype=a.dtype)
        if a.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.ropes = nn.ModuleList(RotaryEmbedding(rope) for rope in a.ropes)
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(
        cls,
        config: CheckpointConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int | None,
        methods: LinearMethods,
    ) -> Llama:
        return cls(cls.adapt(read_architecture(config, dtype=dtype, max_model_len=max_model_len)), methods)

    @staticmethod
    def make_mlp(architecture: Architecture, index: int, methods: LinearMethods) -> nn.Module:
        """What layer `index` has after its attention, called as an `MLP` is."""
        return MLP(architecture, methods, intermediate_size=architecture.intermediate_size)

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        """Adds what only the family's name says; a variant overrides it."""
        return architecture

    @property
    def widths(self) -> dict[str, int]:
        """Elements between the two products of its MLPs, by the name of each kind."""
        return {"intermediate": self.architecture.intermediate_size}

    @property
    def why_not_compiled(self) -> str:
        a = self.architecture
        if len(a.ropes) > MAX_ROTATIONS:
            return f"{len(a.ropes)} rotations, more than {MAX_ROTATIONS}"
        sizes = {"hidden": a.hidden_size, "head": a.attention_layers[0].head_dim, **self.widths}
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

    @property
    def output_layer(self) -> nn.Module:
        return self.lm_head

    def embedding_rows(self, token_ids: Tensor) -> Tensor:
        return self.embed_tokens.rows(token_ids)

    @property
    def ties_output(self) -> bool:
        """Whether the output layer's matrix is the embedding."""
        return self.architecture.tie_word_embeddings

    @property
    def keeps_levels(self) -> bool:
        return self.methods.keeps_tables

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor | StoredLevels]]) -> None:
        places = dict(self._places())
        unexpected = []
        loaded: set[str] = set()
        for name, weight in self._one_by_one(weights):
            if name in places and name not in loaded:
                places[name].fill(name, weight)
                loaded.add(name)
            elif name not in places and not self._is_derived(name):
                unexpected.append(name)
            del weight  # while the next one is computed, this one's memory is free
        check_weight_names(places.keys() - loaded, unexpected)

    def fill(self, name: str, values: Tensor) -> None:
        super().fill(name, values)
        if name == "embed_tokens.weight":
            self._pack_tied_output(self.embed_tokens.weight.data)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places()}

    def stored_names(self, path: str) -> list[str]:
        layer = self.get_submodule(path)
        assert isinstance(layer, KeptMatrix)
        is_tied = layer is self.lm_head and self.architecture.tie_word_embeddings
        name = path if layer is self.lm_head else f"model.{path}"
        return ["model.embed_tokens.weight"] if is_tied else [name for name, _ in self._places_of(name, layer)]

    def blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def _one_by_one(
        self, weights: Iterable[tuple[str, Tensor | StoredLevels]]
    ) -> Iterable[tuple[str, Tensor | StoredLevels]]:
        """The weights under the names of `_destinations`, where checkpoints have several ways to name one."""
        return weights

    def _is_derived(self, name: str) -> bool:
        """Whether checkpoints hold it though it is computed from the rest of them, or from keys and values."""
        is_tied = self.architecture.tie_word_embeddings and name == "lm_head.weight"
        return is_tied or name.endswith("rotary_emb.inv_freq") or is_kv_scale(name)

    def _places(self) -> Iterator[tuple[str, Place]]:
        """Where each weight of a checkpoint goes: to a layer, as one of its matrix's parts, or to a parameter."""
        for path, module in self.named_modules():
            name = path if path == "lm_head" else f"model.{path}"
            if isinstance(module, KeptMatrix):
                yield from self._places_of(name, module)
            elif module is self.embed_tokens:
                shape = (self.vocab_size, self.hidden_size)
                yield f"{name}.weight", Place(shape, self._load_table, self._keep_table)
            else:
                for kind, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{kind}", Place(tuple(parameter.shape), parameter.data.copy_)

    def _places_of(self, name: str, layer: KeptMatrix) -> Iterator[tuple[str, Place]]:
        parent = name.rpartition(".")[0]
        is_tied = layer is self.lm_head and self.architecture.tie_word_embeddings
        for part in layer.spec.parts:
            place = f"{parent}.{part.name}" if part.name else name
            for kind, shape in {} if is_tied else layer.method.stored(layer.spec, part).items():
                load = partial(layer.load, part.name, name=kind)
                yield f"{place}.{kind}", Place(shape, load, load)
            if isinstance(layer, Linear) and layer.bias is not None:
                rows = layer.bias.data[layer.spec.rows(part.name)]
                yield f"{place}.bias", Place(tuple(rows.shape), rows.copy_)

    def _keep_table(self, table: StoredLevels) -> None:
        """The embedding in integers; an output layer that shares it has them too."""
        self._pack_tied_output(table)
        kept = self.methods.method.keep_table(table, self.lm_head.weight)
        if kept is None:
            self._load_table(as_floats(table))
        else:
            self.embed_tokens.keep(kept)

    def _load_table(self, table: Tensor) -> None:
        """The embedding, in the floats that a file has it in where who runs the model reads those: once, if an output
        layer that shares it has them too."""
        own = self.embed_tokens.weight
        is_no_wider = table.is_floating_point() and table.dtype.itemsize <= own.dtype.itemsize
        if not (self.methods.keeps_tables and is_no_wider):
            own.data.copy_(table)
            self._pack_tied_output(self.embed_tokens.weight.data)
            return
        self._pack_tied_output(table)
        shared = self.methods.method.shared_table(table, self.lm_head.weight) if self.ties_output else None
        if shared is not None:
            self.embed_tokens.keep(shared)
            return
        self.embed_tokens.weight = nn.Parameter(table.clone(), requires_grad=False)
        if self.lm_head.weight is own:
            self.lm_head.weight = self.embed_tokens.weight

    def _pack_tied_output(self, table: Tensor | StoredLevels) -> None:
        if self.ties_output and self.lm_head.method is not PLAIN:
            self.lm_head.load_whole(table)


def merged_parts(architecture: Architecture, sizes: dict[str, int]) -> tuple[Part, ...]:
    """Of a matrix that most checkpoints keep in parts. sizes: rows of each, by name"""
    if architecture.has_merged_weights:
        return (Part("", sum(sizes.values())),)
    return tuple(Part(name, num_rows) for name, num_rows in sizes.items())
