"""EAGLE-3 heads as their files have them, of every layout that was published.

Files come from anybody, so nothing is believed before it is checked: the shapes of all tensors are, from the headers,
before one of them is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.speculation.eagle_config import EagleConfig, read_eagle_config
from engine.speculation.proposer import TargetShape
from engine.speculation.tensor_file import TensorFile, drafter_error, open_tensor_file, read_config

_FILES = ("model.safetensors", "pytorch_model.bin")
_MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_UNUSED = re.compile(r"t2d|verifier_.*|.*rotary_emb\.inv_freq")  # which only training needs, or nobody
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleLayer:
    """Weights of one layer: matrices by their names in the checkpoint, with a bias where there is one."""

    matrices: dict[str, tuple[Tensor, Tensor | None]]  # "self_attn.q_proj": [outputs, inputs], [outputs]
    input_norm: Tensor
    mlp_norm: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleWeights:
    """fc: [hidden_size, fused]; None: the target's states are taken as they are. fused_norms: of each of them, or one
    of all of them, before that
    embedding: [vocab_size, hidden_size] in the file's dtype; None: the target's. output: [draft_vocab_size,
    hidden_size]; None: the target's
    target_ids: [draft_vocab_size] the target's token of each row; None: they are alike
    mask_state: [1, fused] stands for the states that are not known yet, of a head that drafts in one pass
    """

    layers: list[EagleLayer]
    hidden_norm: Tensor
    norm: Tensor
    fc: Tensor | None
    fused_norms: list[Tensor]
    embedding: Tensor | None
    output: Tensor | None
    target_ids: Tensor | None
    mask_state: Tensor | None


class EagleCheckpoint:
    """A head that fits its target, of which nothing but headers was read yet.

    num_parameters: of what is kept; without what is the target's, unless a copy of that is kept too
    is_parallel: it makes all drafts in one pass (P-EAGLE)
    """

    def __init__(self, path: Path, config: EagleConfig, tensors: TensorFile) -> None:
        self.config = config
        self._path, self._tensors = path, tensors
        self._names = {_own_name(name): name for name in tensors.names()}
        self._shapes = dict(self._wanted())
        self._check()

    @property
    def num_parameters(self) -> int:
        sizes = [torch.Size(shape).numel() for name, shape in self._shapes.items() if name in self._names]
        config = self.config
        copied = 0 if "lm_head.weight" in self._names else config.draft_vocab_size * config.hidden_size
        return sum(sizes) + copied

    @property
    def num_embedding_parameters(self) -> int:
        name = "embed_tokens.weight"
        return torch.Size(self._shapes[name]).numel() if name in self._names else 0

    @property
    def is_parallel(self) -> bool:
        return "mask_hidden" in self._names

    def read(self, *, dtype: torch.dtype, device: torch.device, keeps_matrices: bool = False) -> EagleWeights:
        """Reads all tensors in this dtype, but the embedding in its own. keeps_matrices: matrices in theirs too"""

        def take(name: str) -> Tensor:
            values = self._floats(name).to(device)
            return values if keeps_matrices and values.dim() == 2 and name != "mask_hidden" else values.to(dtype)

        def take_if_there(name: str) -> Tensor | None:
            return take(name) if name in self._names else None

        layers = []
        for index in range(self.config.num_layers):
            prefix = f"layers.{index}."
            matrices = {
                name: (take(f"{prefix}{name}.weight"), take_if_there(f"{prefix}{name}.bias"))
                for name in (*_MATRICES, *_MLP)
            }
            norms = [take(f"{prefix}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")]
            layers.append(EagleLayer(matrices=matrices, input_norm=norms[0], mlp_norm=norms[1]))
        embedding = self._floats("embed_tokens.weight").to(device) if "embed_tokens.weight" in self._names else None
        target_ids, output = self._target_ids(), take_if_there("lm_head.weight")
        if output is None and embedding is not None and self.config.ties_output:
            output = embedding if target_ids is None else embedding[target_ids.to(device)]
            output = output if keeps_matrices else output.to(dtype)
        return EagleWeights(
            layers=layers,
            hidden_norm=take("layers.0.hidden_norm.weight"),
            norm=take("norm.weight"),
            fc=take_if_there("fc.weight"),
            fused_norms=[take(f"{name}.weight") for name in self._fused_norms()],
            embedding=embedding,
            output=output,
            target_ids=None if target_ids is None else target_ids.to(device),
            mask_state=take("mask_hidden").reshape(1, -1) if self.is_parallel else None,
        )

    def _fused_norms(self) -> list[str]:
        if self._has_any("fc_norm.") or self.config.fc_norm:
            return [f"fc_norm.{index}" for index in range(len(self.config.hidden_layers))]
        return ["input_norm"] if "input_norm.weight" in self._names or self.config.norm_before_fc else []

    def _wanted(self) -> Iterator[tuple[str, Shape]]:
        """The tensors of such a head and their shapes."""
        c = self.config
        size, num_fused = c.hidden_size, max(len(c.hidden_layers), 1)
        fused = num_fused * c.target_hidden_size
        outputs = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
        for index in range(c.num_layers):
            prefix = f"layers.{index}."
            inputs = 2 * size if index == 0 else size
            shapes = {f"self_attn.{name}_proj": (width, inputs) for name, width in outputs.items()}
            shapes["self_attn.o_proj"] = (size, outputs["q"])
            shapes |= {f"mlp.{name}_proj": (c.intermediate_size, size) for name in ("gate", "up")}
            shapes["mlp.down_proj"] = (size, c.intermediate_size)
            for name, shape in shapes.items():
                yield f"{prefix}{name}.weight", shape
                if f"{prefix}{name}.bias" in self._names:
                    yield f"{prefix}{name}.bias", shape[:1]
            yield f"{prefix}input_layernorm.weight", (size,)
            yield f"{prefix}post_attention_layernorm.weight", (size,)
        yield "layers.0.hidden_norm.weight", (size,)
        yield "norm.weight", (size,)
        if c.hidden_layers:
            yield "fc.weight", (size, fused)
            for name in self._fused_norms():
                yield f"{name}.weight", (c.target_hidden_size if name.startswith("fc_norm") else fused,)
        yield "embed_tokens.weight", (c.vocab_size, size)
        yield "lm_head.weight", (c.draft_vocab_size, size)
        if "d2t" in self._names:
            yield "d2t", (c.draft_vocab_size,)
        if "mask_hidden" in self._names:
            yield "mask_hidden", (1, fused)

    def _check(self) -> None:
        """ValueError, with the numbers, for what is missing, of another shape, or not known."""
        c, wanted = self.config, self._shapes
        if not self._has_any("fc.") and c.hidden_layers:
            raise self._error("it has no fc.weight, which fuses the states of several layers, as all EAGLE-3 heads do")
        fc = self._shape("fc.weight") if self._has_any("fc.") else ()
        if "layers.0.hidden_norm.weight" not in self._names and fc == (c.hidden_size, 2 * c.hidden_size):
            raise self._error(
                f"it is a head of EAGLE-1 or -2, whose fc.weight has shape {list(fc)}, and only EAGLE-3 and its "
                "successors can be read"
            )
        shared = {"embed_tokens.weight", "lm_head.weight"}  # where the head has none, they are the target's
        missing = sorted(wanted.keys() - self._names.keys() - shared)
        if missing:
            raise self._error(f"{len(missing)} tensors are missing: {', '.join(missing[:5])}")
        if c.ties_output and "embed_tokens.weight" in self._names:
            shared.discard("lm_head.weight")
        for name in shared - self._names.keys():
            if c.hidden_size != c.target_hidden_size:
                raise self._error(
                    f"{name} is missing, and the model's has {c.target_hidden_size} features where the head has "
                    f"{c.hidden_size}"
                )
        unknown = sorted(name for name in self._names.keys() - wanted.keys() if not _UNUSED.fullmatch(name))
        if unknown:  # a head without a part of it would only guess badly
            raise self._error(f"{len(unknown)} tensors are no part of an EAGLE-3 head: {', '.join(unknown[:5])}")
        for name in sorted(wanted.keys() & self._names.keys()):
            found, shape = self._shape(name), wanted[name]
            if found != shape and (name != "mask_hidden" or torch.Size(found).numel() != shape[1]):
                raise self._error(f"{name} has shape {list(found)}, but its config and the model ask for {list(shape)}")
        if "d2t" not in self._names and c.draft_vocab_size != c.vocab_size:
            raise self._error(
                f"it knows {c.draft_vocab_size:,} of {c.vocab_size:,} tokens, but there is no d2t that says which"
            )
        if self.is_parallel and c.mask_token is None:
            raise self._error("it has mask_hidden, so drafts in one pass, but config.json names no mask token")

    def _target_ids(self) -> Tensor | None:
        """The file has the distance of each token of the head from the target's."""
        if "d2t" not in self._names:
            return None
        offsets = self._tensors.read(self._names["d2t"])
        if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
            raise self._error(f"d2t holds {offsets.dtype} where distances of token ids should be")
        ids = torch.arange(len(offsets)) + offsets.long()
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise self._error(
                f"d2t leads to tokens {lowest} to {highest}, but the vocabulary has {self.config.vocab_size:,}"
            )
        if len(torch.unique(ids)) != len(ids):
            raise self._error("d2t leads to a token twice")
        return ids

    def _floats(self, name: str) -> Tensor:
        tensor = self._tensors.read(self._names[name])
        if tensor.dtype not in _DTYPES:
            raise self._error(f"{name} holds {tensor.dtype}, and only heads in floating point can be read")
        if not bool(torch.isfinite(tensor).all()):
            raise self._error(f"{name} holds NaN or infinity")
        return tensor

    def _shape(self, name: str) -> Shape:
        return self._tensors.shape(self._names[name])

    def _has_any(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._names)

    def _error(self, reason: str) -> ValueError:
        return drafter_error(self._path, reason)


def open_eagle_checkpoint(path: Path, target: TargetShape) -> EagleCheckpoint:
    """Reads a directory's config and the headers of its tensors. ValueError, with what to do, for what does not fit."""
    if not path.exists():
        raise ValueError(f"there is no EAGLE head in {path}: it does not exist; name a directory that holds one")
    fields = read_config(path)
    if not fields:
        raise drafter_error(path, "it has no config.json, without which a head's sizes are not known")
    return EagleCheckpoint(path, read_eagle_config(path, fields, target), open_tensor_file(path, _FILES))


def _own_name(name: str) -> str:
    """midlayer.* of the official files is layers.0.* of others; some put model. before all but the output layer."""
    name = name.removeprefix("model.")
    name = name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name
    return "d2t" if name == "draft_id_to_target_id" else name
