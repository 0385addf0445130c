"""Runs any transformers decoder on our paged KV cache: their layers, our attention.

transformers calls attention through a table of functions (`AttentionInterface`), and builds no mask for a function
that it does not know: ours needs none, as the back end knows which row sees which token.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Protocol, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from engine.attention.backend import AttentionBackend
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer, group_layers
from engine.models.architecture import check_attention_layers
from engine.models.context_length import length_where_rope_changes, read_trained_context
from engine.models.model import Model, check_weight_names
from engine.models.model_error import FOREIGN_ERRORS
from engine.quantization.linear import LinearMethods, exchange_linear, exchange_linears, plain_linears
from engine.quantization.stored_levels import StoredLevels, as_floats

_LONGEST_REASON = 300  # characters; lists of weights or classes are longer
ATTENTION_NAME = "peregrine"  # in transformers' table
_MEANINGS = {"s_aux": "sinks", "sinks": "sinks", "position_bias": "a bias for each distance"}  # of keyword arguments
HARMLESS_TENSORS = {"position_ids", "cache_position"}  # keyword arguments whose meaning is in the ForwardBatch


class AttentionCall(Protocol):
    """What a layer's call of the attention function ends in."""

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(slots=True)
class CurrentStep:
    """What one model's layers are attending in. Its attention modules hold it, as not all are handed arguments."""

    call: AttentionCall | None = None

    @contextmanager
    def of(self, call: AttentionCall) -> Iterator[None]:
        self.call = call
        try:
            yield
        finally:
            self.call = None


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Attends in one step's batch. `layers` are numbered as transformers numbers them."""

    layers: dict[int, AttentionLayer]
    batch: ForwardBatch
    attention: AttentionBackend

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, self.layers[layer.index], self.batch)


@dataclass(frozen=True, slots=True)
class AttentionRecorder:
    """Learns the layers of a model from a forward pass over nothing."""

    layers: dict[int, AttentionLayer] = field(default_factory=dict)

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
            raise ValueError(f"queries, keys and values differ in size: {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}")
        if layer.index in self.layers:
            raise ValueError(f"layer {layer.index} attends twice")
        self.layers[layer.index] = layer
        return torch.empty_like(q)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of a layer's call that we know. Layers hand down others too."""

    scaling: float | None
    sliding_window: int | None
    softcap: float | None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, None]:
    """The function in transformers' table. query, key, value: [1, heads of each, num_tokens, head_dim].

    Raises ValueError for attention that our back ends do not compute.
    """
    if getattr(module, "is_causal", True) is False:
        raise ValueError("it attends to later tokens too")
    tensors = {name for name, argument in options.items() if isinstance(argument, Tensor)} - HARMLESS_TENSORS
    if attention_mask is not None or tensors:
        needs = [_MEANINGS.get(name, f"an input called {name}") for name in sorted(tensors)]
        raise ValueError(f"its attention has {' and '.join(needs) or 'masks of its own'}, which ours does not compute")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = options.get("scaling")
    layer = AttentionLayer(
        index=int(module.layer_idx),  # type: ignore[arg-type]  # transformers' attribute
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
        window=options.get("sliding_window"),
        soft_cap=options.get("softcap"),
    )
    step = module.peregrine_step
    assert isinstance(step, CurrentStep)
    assert step.call is not None, "attention outside of a step"
    return step.call(layer, q, k, v)[None], None


AttentionInterface.register(ATTENTION_NAME, attend)


class HiddenStatesAlone(BaseModelOutput):  # type: ignore[misc]  # whose type is known at run time only
    """A decoder's outputs of which only the hidden states exist: whatever else a head hands on is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenHiddenStates(nn.Module):
    """Stands where a causal language model has its decoder, so that its own head runs on hidden states we have."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> HiddenStatesAlone:
        return HiddenStatesAlone(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> GivenHiddenStates:
        """Some heads (OPT's) ask the decoder inside of the model."""
        return self


class TransformersModel(Model):
    """A transformers causal language model, taken apart into decoder and head.

    The head keeps whatever the architecture does to its logits: scales, soft caps, biases. A checkpoint is loaded whole
    by transformers, which alone knows what a family renames and merges; only then are its linear layers packed, so
    that memory peaks at the whole model in its dtype. Weights given to `fill` are packed as they come.
    """

    def __init__(
        self, model: PreTrainedModel, layers: dict[int, AttentionLayer], methods: LinearMethods | None = None
    ) -> None:
        config = model.config.get_text_config()
        super().__init__(list(layers.values()), vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        self.layers, self.methods = layers, methods or LinearMethods()
        self.step = _share_step(model)
        self.decoder, self.head = _take_apart(model)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, dtype: torch.dtype, max_model_len: int | None, methods: LinearMethods
    ) -> TransformersModel:
        _check_rope(config, max_model_len)
        layers = _record_layers(config)
        return cls(_build(config, dtype), layers, methods)

    @property
    def loads_whole(self) -> bool:
        return True

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        with self.step.of(AttentionStep(self.layers, batch, attention)):
            outputs = self.decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                output_hidden_states=bool(self.hidden_layers),
            )
        hidden: Tensor = outputs.last_hidden_state
        if not self.hidden_layers:
            return hidden[0]
        return torch.cat((hidden[0], *(outputs.hidden_states[layer][0] for layer in self.hidden_layers)), dim=1)

    @property
    def output_layer(self) -> nn.Module:
        layer: nn.Module = self.head.get_output_embeddings()
        return layer

    def embedding_rows(self, token_ids: Tensor) -> Tensor:
        layer = cast(PreTrainedModel, self.decoder).get_input_embeddings()
        return torch.nn.functional.embedding(token_ids, cast(Tensor, layer.weight))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        place = self.head.base_model_prefix
        parameters = [(f"{place}.{name}", parameter) for name, parameter in self.decoder.named_parameters()]
        return {name: tuple(p.shape) for name, p in [*parameters, *self.head.named_parameters()]}

    def fill(self, name: str, values: Tensor) -> None:
        super().fill(name, values)
        weight = self.get_parameter(name)
        for parent, child_name, child in plain_linears(self):
            if child.weight is weight:
                exchange_linear(parent, child_name, self.methods)

    def load_weights(self, weights: Iterable[tuple[str, Tensor | StoredLevels]]) -> None:
        """transformers loads: it knows which names changed, and which weights it merges (experts)."""
        kind, config = type(self.head), self.head.config
        parameter = next(self.parameters())
        device, dtype = parameter.device, parameter.dtype
        del self.decoder, self.head, parameter  # their memory is needed
        model, info = _load_quietly(kind, config, {name: as_floats(weight) for name, weight in weights}, dtype)
        shapes = [str(mismatch) for mismatch in info["mismatched_keys"]]
        if shapes:
            raise ValueError(f"the checkpoint's shapes do not fit its config.json: {', '.join(shapes[:5])}")
        check_weight_names(info["missing_keys"], info["unexpected_keys"])
        self.step = _share_step(model)
        self.decoder, self.head = _take_apart(model.to(device))
        exchange_linears(self, self.methods, num_threads=torch.get_num_threads())


def _check_rope(config: PreTrainedConfig, max_model_len: int | None) -> None:
    limit = length_where_rope_changes(config)
    if limit is not None and (max_model_len or read_trained_context(config)) > limit:
        raise ValueError(
            f"beyond {limit} tokens, {config.model_type}'s rotary positions in transformers depend on what else is in "
            f"the batch; set model.max_model_len to {limit} or less"
        )


def _record_layers(config: PreTrainedConfig) -> dict[int, AttentionLayer]:
    """The attention layers, in order, as one forward pass on the meta device calls them: without weights or time.

    Raises ValueError where not every layer is attention that our back ends compute, or the head needs more of the
    decoder than its hidden states.
    """
    recorder = AttentionRecorder()
    with torch.device("meta"):
        model = _build(config, torch.bfloat16)  # on meta, products of experts exist in no other type
        tokens = torch.zeros((1, 2), dtype=torch.int64)  # as in a prompt: of one token, some take another way
        try:
            step = _share_step(model)
            decoder, head = _take_apart(model)
            with step.of(recorder):
                outputs = decoder(input_ids=tokens, position_ids=tokens, use_cache=False)
            head(inputs_embeds=outputs.last_hidden_state, use_cache=False)
        except FOREIGN_ERRORS as error:
            raise _refusal(config, error) from error
    numbers = sorted(recorder.layers)
    layers = group_layers([replace(recorder.layers[number], index=i) for i, number in enumerate(numbers)])
    check_attention_layers(config.get_text_config(), layers)
    return dict(zip(numbers, layers, strict=True))


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    own_config = copy.deepcopy(config)  # the model writes the name of its attention into it
    try:
        model = AutoModelForCausalLM.from_config(own_config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except FOREIGN_ERRORS as error:
        raise _refusal(config, error) from error
    _check_class(model)
    model.tie_weights()
    return _ready(model)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """For inference, with rotations that stay what they are: none is served at a length where they would change."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            module.rope_type = "default"  # else every step would wait for its longest position
        elif isinstance(rope_type, dict):
            module.rope_type = dict.fromkeys(rope_type, "default")
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # it would wait for each step's tokens
    return model.eval().requires_grad_(False)


def _say_nothing(*_: object) -> None:
    pass


def _refusal(config: PreTrainedConfig, error: Exception) -> ValueError:
    return ValueError(f"{config.model_type} cannot run on a paged KV cache: {_reason(error)}")


def _reason(error: Exception) -> str:
    """In the user's words. What transformers' code says of its own insides is for its authors."""
    if isinstance(error, KeyError) and error.args == (ATTENTION_NAME,):
        return "it chooses its attention from a list of its own, where ours is not"
    if isinstance(error, ValueError) and str(error).startswith("Unrecognized configuration"):
        return "transformers has no causal language model of that kind"
    if isinstance(error, ValueError) and len(str(error)) <= _LONGEST_REASON:
        return str(error)
    if "meta" in str(error) and isinstance(error, RuntimeError):
        return "what its layers compute depends on the values of tensors, so it cannot be planned without its weights"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    return (
        f"transformers' code for it does not run from this config.json without masks and a cache of its own ({place})"
    )


def _check_class(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not model._can_set_attn_implementation() or model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(f"{name} does not attend through transformers' attention interface, so it cannot be paged")
    if model._is_stateful:
        raise ValueError(f"{name} has recurrent layers, whose state our KV cache does not hold")
    if model.base_model is model or "position_ids" not in signature(model.base_model.forward).parameters:
        raise ValueError(f"{name} has no decoder that takes its tokens' positions")


def _share_step(model: PreTrainedModel) -> CurrentStep:
    """Gives every module that may call `attend` the same place to look for the step."""
    step = CurrentStep()
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.peregrine_step = step
    return step


def _take_apart(model: PreTrainedModel) -> tuple[nn.Module, PreTrainedModel]:
    """The decoder, and the model without it."""
    decoder = model.base_model
    setattr(model, model.base_model_prefix, GivenHiddenStates())
    return decoder, model


def _load_quietly(
    kind: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    has_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.device("cpu"):  # elsewhere, transformers asks for another package to place the weights
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported, not raised
            )
    finally:
        if has_progress_bar:
            logging.enable_progress_bar()
    return _ready(model), info
