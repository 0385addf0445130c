"""An opened checkpoint: its config, checked against bounds and against its files before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from engine.config import ModelConfig
from engine.loading.config_numbers import check_numbers
from engine.loading.gguf.tensors import gguf_config
from engine.loading.json_file import JsonObject, read_json_object
from engine.loading.plain_config import read_plain_config
from engine.loading.quantized.checkpoint import QuantizedWeights, read_quantized
from engine.loading.quantized.scheme import find_scheme
from engine.loading.source import ModelSource, files_that_are_there
from engine.loading.stored_weights import (
    StoredTensor,
    check_is_not_quantised,
    check_num_layers,
    has_output_of_its_own,
    read_stored_weights,
)
from engine.loading.text_part import name_in_text_part, text_config
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.model_error import FOREIGN_ERRORS, ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """config: of the language model; whole_config: the same, or that of the multimodal model around it.

    stored: what its safetensors files hold; empty for GGUF files, random weights, and files that are not here yet
    quantized: the matrices among that which are quantised
    """

    source: ModelSource
    config: CheckpointConfig
    whole_config: CheckpointConfig
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    quantized: QuantizedWeights = field(default_factory=QuantizedWeights)

    @property
    def is_part(self) -> bool:
        return self.config is not self.whole_config

    @property
    def architecture(self) -> str:
        """The checkpoint's name for it, such as LlamaForCausalLM."""
        return self.config.architectures[0] if self.config.architectures else str(self.config.model_type)


def open_checkpoint(source: ModelSource, settings: ModelConfig) -> Checkpoint:
    """Reads configs and headers only. ModelError for what cannot be served, with the reason."""
    if source.kind == "gguf":
        config = gguf_config(source.gguf_header, implementation=settings.implementation)
        return Checkpoint(source, config, config)
    fields = read_json_object(source.path / "config.json")
    check_numbers(fields, f"{source.path}/config.json")
    whole = _read_config(source, settings, fields)
    try:
        config = text_config(whole)
        _forget_quantization(whole, config)  # the layers are those of any model, whatever fills them
        if settings.load_format == "dummy":
            return Checkpoint(source, config, whole)
        stored = read_stored_weights(source.weight_files or files_that_are_there(source.path))
        quantized = _read_quantized(source, fields, stored if config is whole else _of_text_part(stored))
        check_num_layers(stored, getattr(config, "num_hidden_layers", 0))
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{source.path}: {error}") from error
    _settle_output_layer(config, stored, quantized)
    return Checkpoint(source, config, whole, stored, quantized)


def _of_text_part(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in stored.items() if name_in_text_part(name) is not None}


def _read_quantized(source: ModelSource, fields: JsonObject, stored: Mapping[str, StoredTensor]) -> QuantizedWeights:
    """ValueError for what is quantised in a way that is not known. fields: of config.json"""
    scheme = find_scheme(fields, source.path, stored)
    quantized = QuantizedWeights() if scheme is None else read_quantized(stored, scheme)
    check_is_not_quantised(quantized.rest(stored), None if scheme is None else scheme.method)
    return quantized


def _forget_quantization(*configs: CheckpointConfig) -> None:
    for config in configs:
        for name in ("quantization_config", "compression_config", "quantization"):
            vars(config).pop(name, None)


def _read_config(source: ModelSource, settings: ModelConfig, fields: JsonObject) -> CheckpointConfig:
    if settings.implementation != "transformers":
        plain = read_plain_config(source.path)
        if plain is not None:
            return plain
    from transformers import AutoConfig  # seconds: it imports the config of every family

    try:
        hf_config: CheckpointConfig = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, StrictDataclassError, *FOREIGN_ERRORS) as error:
        raise ModelError(f"{source.path}/config.json cannot be used: {_reason(fields, error)}") from error
    return hf_config


def _reason(fields: JsonObject, error: Exception) -> str:
    """In the user's words, as far as they are known; transformers' are paragraphs."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    family = fields.get("model_type")
    if not isinstance(family, str):
        return f"its model_type is {family!r}, but it must be the name of a family; download it again"
    if family not in CONFIG_MAPPING_NAMES and "auto_map" in fields:
        return (
            f"{family} needs Python code from the checkpoint, which is never run; transformers {__version__} has none"
        )
    if family not in CONFIG_MAPPING_NAMES:
        return f"transformers {__version__} does not know the family {family!r}; a later release may"
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}; download it again"


def _settle_output_layer(
    config: CheckpointConfig, stored: Mapping[str, StoredTensor], quantized: QuantizedWeights
) -> None:
    """Whether the output layer shares the embedding's matrix is what the files say, where they say it.

    Configs are often wrong about it: a fine-tuned output layer beside `tie_word_embeddings: true`, or a field that
    moved between the config of a multimodal model and that of its text part.
    """
    is_own = quantized.has_output or has_output_of_its_own(stored)
    if is_own and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def read_generation_config(source: ModelSource) -> GenerationConfig | None:
    """ModelError for a file that is there and cannot be used."""
    path = source.path / "generation_config.json"
    if source.kind == "gguf" or not path.is_file():
        return None
    read_json_object(path)
    from transformers import GenerationConfig  # a second

    try:
        generation: GenerationConfig = GenerationConfig.from_pretrained(source.path)
    except (OSError, StrictDataclassError, *FOREIGN_ERRORS) as error:
        raise ModelError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}; mend or delete it") from error
    return generation
