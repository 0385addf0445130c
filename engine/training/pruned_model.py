"""A draft model cut out of its target: the same embedding, output and norms, and some of its layers.

What is left of a model without most of its layers says nothing sensible, but learns its target's language back in a
small part of what training from nothing would take (layer pruning and distillation: Muralidharan et al. 2024, arXiv
2407.14679, section 2). It is an ordinary model of the target's family, with its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.ipc.messages import TokenizerAssets
from engine.loading.loader import open_weights
from engine.loading.tokenizer_assets import save_tokenizer
from engine.models.checkpoint_config import BareConfig
from engine.models.model_error import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # dense, and with logits that are plain products
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class PrunedModel(nn.Module):
    """Layers of the target with gradients, under its own embedding and output, which stay as they are."""

    def __init__(self, config: PreTrainedConfig, weights: dict[str, Tensor]) -> None:
        """config: of what is kept; weights: of all of it, by its own names"""
        super().__init__()
        from transformers import AutoModelForCausalLM  # seconds

        self.config = config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        missing, unknown = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
        if missing or unknown:
            raise ModelError(f"weights of the model are missing or not known: {', '.join([*missing, *unknown][:5])}")
        self._model = model
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            matrix.weight.requires_grad_(False)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def output(self) -> Tensor:
        """[vocab_size, hidden_size]"""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """The last hidden states, normalised. [n, length] -> [n, length, hidden_size]; each text begins its row."""
        states: Tensor = self._model.model(input_ids=token_ids, use_cache=False).last_hidden_state
        return states

    def save(self, folder: Path, *, tokenizer: TokenizerAssets, fields: dict[str, object]) -> None:
        """Writes a model that is loaded as any other, in bfloat16, with `fields` in its config."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in self._model.named_parameters()}
        partial = folder / ".model.safetensors"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets nobody else read it
        partial.replace(folder / "model.safetensors")
        config = self.config.to_dict() | {"dtype": "bfloat16"} | fields
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, folder)


def prune(model: ModelConfig, num_layers: int | None) -> PrunedModel:
    """num_layers: that are kept; None: a quarter. ModelError for a model that this cannot be done with."""
    given, weights = open_weights(model)
    config = given.of_family() if isinstance(given, BareConfig) else deepcopy(given)
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{model.path} is of the family {config.model_type}, and draft models are cut out of {', '.join(FAMILIES)} "
            "alone; train heads, without --draft"
        )
    total = int(config.num_hidden_layers)
    wanted = max(1, total // 4) if num_layers is None else num_layers
    if wanted >= total:
        raise ModelError(f"{model.path} has {total} layers, so a draft model may keep 1 to {total - 1}, not {wanted}")
    kept = kept_layers(total, wanted)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # what each layer is
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = wanted
    return PrunedModel(config, _of_layers(weights, kept))


def kept_layers(total: int, wanted: int) -> list[int]:
    """The first and the last, which read and write, and others evenly between them; of one, the first."""
    if wanted == 1:
        return [0]
    return [round(index * (total - 1) / (wanted - 1)) for index in range(wanted)]


def _of_layers(weights: Iterable[tuple[str, Tensor]], kept: list[int]) -> dict[str, Tensor]:
    places = {layer: place for place, layer in enumerate(kept)}
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        match = _LAYER.fullmatch(name)
        if match is None:
            found[name] = tensor.float()
        elif int(match[1]) in places:
            found[f"model.layers.{places[int(match[1])]}.{match[2]}"] = tensor.float()
    return {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}
