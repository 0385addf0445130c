"""What is known of a checkpoint before its weights: transformers' config of its family, or the bare fields of one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CheckpointConfig: TypeAlias = "PreTrainedConfig | BareConfig"


class BareConfig(SimpleNamespace):
    """A config's fields as attributes, for our own layers: to import transformers for them would take a second."""

    model_type: str
    architectures: list[str] | None = None
    is_encoder_decoder: bool = False

    def get_text_config(self) -> BareConfig:
        return self

    def to_json_string(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    def for_transformers(self) -> PreTrainedConfig:
        """The same fields for transformers' functions that take the config of any family."""
        from transformers import PreTrainedConfig

        return PreTrainedConfig(**vars(self))

    def of_family(self) -> PreTrainedConfig:
        """The same fields in the class of their family, with its defaults, for transformers' layers."""
        from transformers import AutoConfig  # seconds: it imports the config of every family

        fields = {name: value for name, value in vars(self).items() if name != "model_type"}
        return AutoConfig.for_model(self.model_type, **fields)
