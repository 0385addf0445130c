"""A model in numbers, known before anything is loaded: what memory is planned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.kv_cache.layer_spec import AttentionLayer
from engine.loading.loading_peak import Matrix
from engine.models.model import ExpertFacts


class StoredKind(NamedTuple):
    """The matrices of one name, in all layers, that a checkpoint has quantised in one format."""

    name: str  # without the layer's number
    label: str  # of the format, for people
    kept_in: int | None  # the format of `kernels.numba.core.formats` that compiled layers are expected to keep it in
    why_float: str  # where that is None
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model in numbers, known before anything is loaded. Parameters are counted once, shared ones included."""

    path: str
    architecture: str  # the checkpoint's name for it, such as LlamaForCausalLM
    num_parameters: int
    num_linear_parameters: int  # weights of linear layers; without the output's, where it shares the embedding's
    num_embedding_parameters: int
    embedding_bytes: float | None = None  # of each of them as compiled layers keep it exactly; None: as floats of more
    is_bfloat16: bool = False  # all that the model reads of a directory of safetensors
    ties_output: bool  # the output layer shares the embedding's matrix
    attention_layers: tuple[AttentionLayer, ...]
    vocab_size: int
    hidden_size: int
    experts: ExpertFacts = ExpertFacts()
    why_not_compiled: str = ""  # as of the model
    widest: int  # most elements that one token has in a layer, other than the output layer
    trained_context: int  # tokens
    longest_context: int = 0  # that may be asked for, where it is longer than the trained one
    rope_changes_at: int | None = None  # tokens, beyond which the rotations of a text depend on its length
    loads_whole: bool = False  # as of the model
    notes: tuple[str, ...] = ()  # what is different from what the files may seem to say
    stored: tuple[StoredKind, ...] = ()  # what is quantised in its files
    matrices: tuple[Matrix, ...] = ()  # those of linear layers, in the order in which they are packed

    @property
    def flops_per_token(self) -> int:
        """Of the matrix products of the layers, and of the output layer where it has a matrix of its own."""
        in_experts = int(self.experts.share * self.experts.num_parameters)
        return max(1, 2 * (self.num_linear_parameters + in_experts))
