"""What the engine asks of a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.attention.backend import AttentionBackend
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.models.operations import load_operations
from engine.quantization.linear import KeptMatrix
from engine.quantization.stored_levels import StoredLevels, as_floats

_KV_SCALE = re.compile(r"\.([kv]_scale|kv_scale|[kv]_proj\.output_scale)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """What a model keeps in experts, of which a token goes through some."""

    num_parameters: int = 0  # of all experts in all layers
    share: float = 0.0  # of them, those that one token goes through
    widest: int = 0  # elements that one token has in a layer's experts: their products and their outputs


class DecoderOutput(NamedTuple):
    """What comes of a step's rows. hidden states: as of `Decoder.forward`; all of it is valid until the next step."""

    hidden: Tensor  # of all rows
    wanted: Tensor  # of those with logits, in the order of `ForwardBatch.logits_rows`
    logits: Tensor  # [num_logits, vocab_size] float32


class Decoder(ABC):
    """What a step asks of a model, whoever runs it.

    `hidden_layers`: the layers whose inputs a drafter wants to see.
    """

    attention_layers: list[AttentionLayer]
    vocab_size: int
    hidden_size: int
    hidden_layers: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """The normalised hidden states of all rows, and beside them the inputs of `hidden_layers`: the residual stream.

        [num_tokens, (1 + number of hidden_layers) * hidden_size]. Writes the KV cache.
        """

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, scaled and soft-capped. [n, hidden_size] -> [n, vocab_size] float32."""

    def compute_step(self, batch: ForwardBatch, attention: AttentionBackend) -> DecoderOutput:
        """`forward`, and the logits of the rows for which somebody wants them."""
        hidden = self.forward(batch, attention)
        wanted = hidden
        if hidden.shape[0] != batch.logits_rows.shape[0]:
            wanted = hidden.index_select(0, batch.logits_rows)
        return DecoderOutput(hidden, wanted, self.logits_of(wanted))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """`compute_logits` of rows as `forward` returns them."""
        return self.compute_logits(hidden[:, : self.hidden_size] if self.hidden_layers else hidden)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight of a checkpoint goes. take_levels: what takes integers as they are; None: they become floats"""

    shape: tuple[int, ...]
    take: Callable[[Tensor], object]
    take_levels: Callable[[StoredLevels], object] | None = None

    def fill(self, name: str, weight: Tensor | StoredLevels) -> None:
        """ValueError that names the weight if it has another shape."""
        if tuple(weight.shape) != self.shape:
            shapes = f"{list(weight.shape)}, but the config asks for {list(self.shape)}"
            raise ValueError(f"the checkpoint's {name} has shape {shapes}")
        if isinstance(weight, Tensor):
            self.take(weight)
        elif self.take_levels is not None:
            self.take_levels(weight)
        else:
            self.take(as_floats(weight))


_ROWS_AT_ONCE = 4096  # of the output layer, which are floats while they are looked at


class Model(Decoder, nn.Module):
    """A decoder that keeps its keys and values in an `AttentionBackend`.

    A new model has memory for its parameters and nothing in it, on whatever device it was built; matrices that will be
    packed have a shape alone. `load_weights` fills it, or `fill` one parameter after the other.
    `attention_layers[i].index` is i. `operations` are torch's until they are exchanged for another back end's.
    """

    def __init__(self, attention_layers: list[AttentionLayer], *, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.attention_layers = attention_layers
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.operations = load_operations("torch")

    def show_inputs_of(self, layers: Sequence[int]) -> None:
        """From now on, `forward` returns what goes into these layers too. Before anything runs or is compiled."""
        num_layers = len(self.attention_layers)
        odd = [layer for layer in layers if not 0 <= layer < num_layers]
        if odd:
            raise ValueError(
                f"the drafter reads the input of layer {odd[0]}; the model has layers 0 to {num_layers - 1}"
            )
        self.hidden_layers = tuple(layers)

    @property
    def experts(self) -> ExpertFacts:
        """None by default: every token goes through all of the model, or nothing is known of its experts."""
        return ExpertFacts()

    @property
    @abstractmethod
    def output_layer(self) -> nn.Module:
        """The linear layer that makes logits of hidden states."""

    def output_rows(self, token_ids: Tensor | None) -> Tensor:
        """Rows of the output layer's matrix, as it is kept, in float32: of some tokens, [n, hidden_size], or of all."""
        layer = self.output_layer
        assert isinstance(layer, KeptMatrix | nn.Linear)
        pieces, places = [], []
        for start in range(0, self.vocab_size, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, self.vocab_size))
            chosen = None
            if token_ids is not None:
                chosen = ((token_ids >= rows.start) & (token_ids < rows.stop)).nonzero().flatten()
                if not len(chosen):
                    continue
                places.append(chosen)
            dense = layer.dense(rows) if isinstance(layer, KeptMatrix) else layer.weight[rows]
            found = dense if chosen is None or token_ids is None else dense[token_ids[chosen].to(dense.device) - start]
            pieces.append(found.detach().float())
        if token_ids is None or not pieces:
            return torch.cat(pieces) if pieces else torch.empty(0, self.hidden_size)
        out = torch.empty(len(token_ids), self.hidden_size, device=pieces[0].device)
        out[torch.cat(places)] = torch.cat(pieces)
        return out

    @abstractmethod
    def embedding_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the input embedding, as it is kept. [n] -> [n, hidden_size]"""

    @property
    def keeps_levels(self) -> bool:
        """Whether `load_weights` takes matrices as `StoredLevels`, where a file has integers."""
        return False

    @property
    def why_not_compiled(self) -> str:
        """What keeps `engine.models.llama_numba` from running it; empty where nothing does."""
        return "layers of another kind than Llama's"

    @property
    def loads_whole(self) -> bool:
        """Whether `load_weights` has all weights in the model's dtype before it packs the first."""
        return False

    def own_name(self, name: str) -> str:
        """The name in `stored_shapes` of a checkpoint's tensor, where checkpoints have several ways to name one."""
        return name

    def stored_names(self, path: str) -> list[str]:
        """What a checkpoint calls the tensors that one linear layer is made of; empty if that is not known."""
        return []

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that a checkpoint's weights must have, by its names; of some or all of them."""
        return {}

    @torch.no_grad()
    def fill(self, name: str, values: Tensor) -> None:
        """Sets one of the parameters that a new model has, whole, by its own name; may pack it.

        values: may be the parameter itself, where it has memory
        """
        path, _, kind = name.rpartition(".")
        owner, parameter = self.get_submodule(path), self.get_parameter(name)
        if isinstance(owner, KeptMatrix) and kind == "weight" and parameter.is_meta:
            owner.load_whole(values)
        elif values is not parameter:
            parameter.data.copy_(values)

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor | StoredLevels]]) -> None:
        """Takes a checkpoint by Hugging Face's names, each tensor in any floating dtype, or with `keeps_levels` as
        integers.

        Raises ValueError that names the weights that are missing, unknown or of another shape.
        """


def is_kv_scale(name: str) -> bool:
    """Whether it is a scale that a checkpoint has for a whole layer's keys or values in 8 bits.

    By compressed-tensors' names, ModelOpt's, and older ones of both. Nothing needs them: `kernels.reference.kv_codes`.
    """
    return _KV_SCALE.search(name) is not None


def check_weight_names(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError naming the weights, unless both are empty."""
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in (("missing", sorted(missing)), ("not part of the model", sorted(unexpected)))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit its config.json: {' and '.join(problems)}")
