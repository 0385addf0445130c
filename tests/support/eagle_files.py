"""Small EAGLE-3 heads of random weights, in every layout, and the definition of what they compute, without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models.model import Model
from engine.speculation.draft_tree import MAX_CHILDREN
from engine.speculation.eagle import EagleProposer
from engine.speculation.eagle_cache import EagleCache
from engine.speculation.eagle_checkpoint import EagleCheckpoint
from engine.speculation.eagle_config import read_eagle_config
from engine.speculation.eagle_head import EagleHead, FloatMatrix, Matrix
from engine.speculation.proposer import TargetShape

VOCAB, TARGET_HIDDEN, NUM_TARGET_LAYERS = 24, 32, 5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 40
EPS, THETA, BLOCK_SIZE = 1e-5, 500.0, 4
AUX_LAYERS = (2, 1, 4)  # whose inputs are fused

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TinyEagle:
    """tensors: by the names of the official files, each layer's under layers.{i}.

    aux: layers of the target whose inputs are fused; known: the target's tokens that the head knows, None: all
    """

    tensors: Tensors
    num_layers: int = 1
    hidden: int = HIDDEN
    target_hidden: int = TARGET_HIDDEN
    aux: tuple[int, ...] = AUX_LAYERS
    vocab: int = VOCAB
    known: tuple[int, ...] | None = None
    fused_norm: str = "none"  # or "each", "all"
    norm_before_residual: bool = False
    norm_output: bool = False
    mask_token: int | None = None
    window: int | None = None

    @property
    def num_known(self) -> int:
        return self.vocab if self.known is None else len(self.known)


def random_eagle(
    *,
    seed: int = 0,
    num_layers: int = 1,
    hidden: int = HIDDEN,
    target_hidden: int = TARGET_HIDDEN,
    vocab: int = VOCAB,
    known: tuple[int, ...] | None = tuple(range(1, VOCAB, 2)),
    aux: tuple[int, ...] = AUX_LAYERS,
    fused_norm: str = "none",
    has_embedding: bool = False,
    has_biases: bool = False,
    mask_token: int | None = None,
    **switches: object,
) -> TinyEagle:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 0.4) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    def norm(size: int) -> Tensor:
        return 1 + draw(size, size=0.2)

    fused = max(len(aux), 1) * target_hidden
    tensors: Tensors = {}
    for index in range(num_layers):
        inputs = 2 * hidden if index == 0 else hidden
        outputs = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
        for name, width in outputs.items():
            tensors[f"layers.{index}.self_attn.{name}.weight"] = draw(width, inputs)
            if has_biases:
                tensors[f"layers.{index}.self_attn.{name}.bias"] = draw(width)
        tensors[f"layers.{index}.self_attn.o_proj.weight"] = draw(hidden, HEADS * HEAD_DIM)
        tensors[f"layers.{index}.mlp.gate_proj.weight"] = draw(INTERMEDIATE, hidden)
        tensors[f"layers.{index}.mlp.up_proj.weight"] = draw(INTERMEDIATE, hidden)
        tensors[f"layers.{index}.mlp.down_proj.weight"] = draw(hidden, INTERMEDIATE)
        tensors[f"layers.{index}.input_layernorm.weight"] = norm(hidden)
        tensors[f"layers.{index}.post_attention_layernorm.weight"] = norm(hidden)
    tensors["layers.0.hidden_norm.weight"], tensors["norm.weight"] = norm(hidden), norm(hidden)
    if aux:
        tensors["fc.weight"] = draw(hidden, fused, size=0.2)
    if fused_norm == "each":
        tensors |= {f"fc_norm.{i}.weight": norm(target_hidden) for i in range(len(aux))}
    if fused_norm == "all":
        tensors["input_norm.weight"] = norm(fused)
    num_known = vocab if known is None else len(known)
    tensors["lm_head.weight"] = draw(num_known, hidden)
    if has_embedding:
        tensors["embed_tokens.weight"] = draw(vocab, hidden, size=1.0)
    if known is not None:
        tensors["d2t"] = torch.tensor([token - i for i, token in enumerate(known)])
        tensors["t2d"] = torch.tensor([token in known for token in range(vocab)])
    if mask_token is not None:
        tensors["mask_hidden"] = draw(1, fused, size=1.0)
    return TinyEagle(
        tensors, num_layers, hidden, target_hidden, aux, vocab, known, fused_norm, mask_token=mask_token, **switches,  # type: ignore[arg-type]
    )  # fmt: skip


def llama_fields(eagle: TinyEagle) -> dict[str, object]:
    fields: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": eagle.hidden,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": eagle.num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": 256,
        "vocab_size": eagle.vocab,
    }
    if eagle.window is not None:
        fields |= {"layer_types": ["sliding_attention"], "sliding_window": eagle.window}
    return fields


def _switches(eagle: TinyEagle) -> dict[str, object]:
    return {
        "norm_before_residual": eagle.norm_before_residual,
        "norm_output": eagle.norm_output,
        "fc_norm": eagle.fused_norm == "each",
        "norm_before_fc": eagle.fused_norm == "all",
        "target_hidden_size": eagle.target_hidden,
    }


def official(eagle: TinyEagle) -> tuple[dict[str, object], Tensors]:
    """yuhuili's: midlayer, and architectures that say nothing."""
    fields = llama_fields(eagle) | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": eagle.num_known}
    return fields | _named(eagle), {_midlayer(name): tensor for name, tensor in eagle.tensors.items()}


def specforge(eagle: TinyEagle) -> tuple[dict[str, object], Tensors]:
    """SpecForge's and SGLang's, whose layers are those whose outputs are fused."""
    inner = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in eagle.aux], "use_aux_hidden_state": True}
    fields = llama_fields(eagle) | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": inner}
    fields |= _switches(eagle) | {"draft_vocab_size": eagle.num_known}
    return fields, {_midlayer(name): tensor for name, tensor in eagle.tensors.items()}


def vllm(eagle: TinyEagle) -> tuple[dict[str, object], Tensors]:
    """vLLM's and AngelSlim's."""
    fields = llama_fields(eagle) | {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": eagle.num_known}
    fields |= _switches(eagle) | _named(eagle)
    if eagle.mask_token is not None:
        fields |= {"pard_token": eagle.mask_token, "parallel_drafting": True}
    if not eagle.aux:
        fields["eagle_config"] = {"use_aux_hidden_state": False}
    return fields, {("" if "lm_head" in name else "model.") + name: t for name, t in eagle.tensors.items()}


def speculators(eagle: TinyEagle) -> tuple[dict[str, object], Tensors]:
    fields: dict[str, object] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": llama_fields(eagle),
        "draft_vocab_size": eagle.num_known,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "tiny"},
        },
    }
    return fields | _switches(eagle) | _named(eagle), eagle.tensors


LAYOUTS = {"official": official, "specforge": specforge, "vllm": vllm, "speculators": speculators}


def write(folder: Path, fields: dict[str, object], tensors: Tensors, *, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    copies = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    if name.endswith(".bin"):
        torch.save(copies, folder / name)
    else:
        save_file(copies, folder / name)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _named(eagle: TinyEagle) -> dict[str, object]:
    return {"eagle_aux_hidden_state_layer_ids": list(eagle.aux)} if eagle.aux else {}


def _midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1)


class TensorsInMemory:
    """A `TensorFile` that is no file."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tiny(eagle: TinyEagle, *, num_target_layers: int = NUM_TARGET_LAYERS) -> EagleCheckpoint:
    """In vLLM's layout."""
    fields, tensors = vllm(eagle)
    target = TargetShape(
        path="tiny",
        vocab_size=eagle.vocab,
        hidden_size=eagle.target_hidden,
        num_layers=num_target_layers,
        block_size=BLOCK_SIZE,
    )
    path = Path("tiny-eagle")
    return EagleCheckpoint(path, read_eagle_config(path, fields, target), TensorsInMemory(tensors))


def make_eagle(
    eagle: TinyEagle,
    model: Model,
    *,
    num_blocks: int,
    num_drafts: int = 5,
    max_children: int = MAX_CHILDREN,
    make_matrix: Callable[[Tensor], Matrix] = FloatMatrix,
    dtype: torch.dtype = torch.float32,
) -> EagleProposer:
    """Shows the model's layers to it."""
    checkpoint = open_tiny(eagle, num_target_layers=len(model.attention_layers))
    model.show_inputs_of(checkpoint.config.hidden_layers)
    weights = checkpoint.read(dtype=dtype, device=torch.device("cpu"))
    assert weights.output is not None
    embedding = model.embed_tokens.weight if weights.embedding is None else weights.embedding
    head = EagleHead(
        checkpoint.config,
        weights,
        embedding_rows=lambda token_ids: embedding[token_ids],
        output=weights.output,
        dtype=dtype,
        make_matrix=make_matrix,
    )
    cache = EagleCache(
        checkpoint.config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return EagleProposer(head, cache, num_drafts=num_drafts, vocab_size=VOCAB, max_children=max_children)


class DenseEagle:
    """The definition: every draft is one pass over its whole text, in float64, with one mask and no memory.

    embedding: [VOCAB, hidden] the target's
    """

    def __init__(self, eagle: TinyEagle, embedding: Tensor) -> None:
        self.eagle = eagle
        self.unseen: list[int] = []  # tokens whose rows nobody sees but they themselves
        self._w = {name: tensor.double() for name, tensor in eagle.tensors.items() if tensor.is_floating_point()}
        self._embedding = self._w.get("embed_tokens.weight", embedding.double())

    def logits_after(self, token_ids: list[int], hidden: Tensor, drafts: list[int]) -> Tensor:
        """What follows a text and these drafts. [known tokens]

        hidden: [len(token_ids) - 1, features] of the target's, as of `Model.forward`, of all tokens but the newest
        """
        states, inputs = self.fused(hidden), token_ids[1:]
        for draft in drafts:  # with the outputs of all rows before, each of which is computed anew
            _, fed_back = self._outputs(inputs, states)
            inputs, states = [*inputs, draft], torch.cat((states, fed_back[-1:]))
        return self._outputs(inputs, states)[0][-1]

    def logits_at_once(self, token_ids: list[int], hidden: Tensor, num_drafts: int) -> Tensor:
        """Of a head that makes all drafts in one pass. [num_drafts, known tokens]"""
        assert self.eagle.mask_token is not None
        masks = self._project(self._w["mask_hidden"]).expand(num_drafts - 1, -1)
        inputs = [*token_ids[1:], *[self.eagle.mask_token] * (num_drafts - 1)]
        return self._outputs(inputs, torch.cat((self.fused(hidden), masks)))[0][-num_drafts:]

    def chain(self, token_ids: list[int], hidden: Tensor, num_drafts: int) -> list[int]:
        """The drafts that are likeliest one after the other, as the target's tokens."""
        if self.eagle.mask_token is not None:
            best = self.logits_at_once(token_ids, hidden, num_drafts).argmax(-1).tolist()
            return [self.token(index) for index in best]
        drafts: list[int] = []
        for _ in range(num_drafts):
            drafts.append(self.token(int(self.logits_after(token_ids, hidden, drafts).argmax())))
        return drafts

    def token(self, index: int) -> int:
        return index if self.eagle.known is None else self.eagle.known[index]

    def fused(self, hidden: Tensor) -> Tensor:
        hidden, size = hidden.double(), self.eagle.target_hidden
        return self._project(hidden[:, size:] if self.eagle.aux else hidden[:, :size])

    def _project(self, fused: Tensor) -> Tensor:
        if not self.eagle.aux:
            return fused
        if self.eagle.fused_norm == "each":
            parts = fused.split(self.eagle.target_hidden, dim=1)
            fused = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=1)
        if self.eagle.fused_norm == "all":
            fused = self._norm(fused, "input_norm")
        return fused @ self._w["fc.weight"].T

    def _outputs(self, inputs: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the states that are fed back, of all rows."""
        normed = self._norm(states, "layers.0.hidden_norm")
        residual = normed if self.eagle.norm_before_residual else states
        x = torch.cat((self._norm(self._embedding[inputs], "layers.0.input_layernorm"), normed), dim=1)
        for index in range(self.eagle.num_layers):
            if index:
                x = self._norm(residual, f"layers.{index}.input_layernorm")
            residual = residual + self._attention(x, f"layers.{index}.self_attn.")
            x = self._norm(residual, f"layers.{index}.post_attention_layernorm")
            gate, up = (x @ self._w[f"layers.{index}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            residual = residual + (gate * torch.sigmoid(gate) * up) @ self._w[f"layers.{index}.mlp.down_proj.weight"].T
        normed = self._norm(residual, "norm")
        return normed @ self._w["lm_head.weight"].T, normed if self.eagle.norm_output else residual

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        num_rows = len(x)
        q, k, v = (self._linear(x, f"{prefix}{name}_proj").view(num_rows, -1, HEAD_DIM) for name in "qkv")
        angles = torch.arange(num_rows).double()[:, None] / THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (_rotated(x, turn) for x in (q, k))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        distance = torch.arange(num_rows)[:, None] - torch.arange(num_rows)
        is_hidden = (distance < 0) | (distance >= (self.eagle.window or num_rows + 1))
        of_unseen = torch.zeros_like(is_hidden)
        of_unseen[:, [token - 1 for token in self.unseen]] = True  # the first row is the second token's
        is_hidden |= of_unseen & (distance != 0)
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(is_hidden, -torch.inf).softmax(-1), v)
        return attended.reshape(num_rows, -1) @ self._w[f"{prefix}o_proj.weight"].T

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._w[f"{name}.weight"].T + self._w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self._w[f"{name}.weight"]


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Halves of a head are the parts of complex numbers."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


VARIANTS: dict[str, tuple[str, TinyEagle]] = {
    "official": ("official", random_eagle()),
    "specforge": ("specforge", random_eagle(seed=1)),
    "vllm, whole vocabulary": ("vllm", random_eagle(seed=2, known=None, has_embedding=True)),
    "speculators": ("speculators", random_eagle(seed=3, norm_before_residual=True)),
    "speculators, one norm of all": (
        "speculators",
        random_eagle(seed=4, fused_norm="all", norm_before_residual=True, norm_output=True, has_embedding=True),
    ),
    "EAGLE 3.1": ("vllm", random_eagle(seed=5, fused_norm="each", norm_output=True)),
    "another width": ("vllm", random_eagle(seed=6, hidden=48, has_embedding=True)),
    "two layers": ("vllm", random_eagle(seed=7, num_layers=2)),
    "last states alone": ("vllm", random_eagle(seed=8, aux=())),
    "window": ("speculators", random_eagle(seed=9, window=7)),
    "P-EAGLE": ("vllm", random_eagle(seed=10, num_layers=2, mask_token=3, has_biases=True)),
    "P-EAGLE 3.1": ("vllm", random_eagle(seed=11, mask_token=0, fused_norm="each", has_embedding=True)),
}


def without(eagle: TinyEagle, *names: str) -> TinyEagle:
    return replace(eagle, tensors={name: tensor for name, tensor in eagle.tensors.items() if name not in names})
