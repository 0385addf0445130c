"""What config.json says of an EAGLE-3 head, in whichever of the published layouts it is written.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840), 3.1 (arXiv 2605.09992) and P-EAGLE (arXiv 2602.01469) are one architecture
with a few switches. Official files and those of SpecForge, SGLang, vLLM and AngelSlim keep the fields of a Llama at the
top; speculators keep them in `transformer_layer_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from engine.models.checkpoint_config import BareConfig
from engine.models.rope import Rope, default_rope, scaled_rope
from engine.speculation.proposer import TargetShape
from engine.speculation.tensor_file import drafter_error

Fields = Mapping[str, object]

_MAX_LAYERS = 16  # of a head
_MAX_POSITIONS = 2048  # of a head whose config does not say
_MASK_TOKEN_FIELDS = ("pard_token", "ptd_token_id", "mask_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """The sizes and switches of a head.

    hidden_layers: layers of the target whose inputs are fused; empty: its last, normalised states are taken as they are
    window: tokens that a layer sees; None: all
    norm_before_residual: the residual starts from the normalised state; norm_output: it is the normalised output that
    the next draft is made from; norm_before_fc: one norm of all fused states; fc_norm: one of each of them
    mask_token: stands for the tokens that are not known yet, in a head that makes all drafts in one pass
    num_drafts: that it was made for, if it says so; ties_output: without an output layer, it has its own embedding
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    window: int | None
    vocab_size: int
    draft_vocab_size: int
    hidden_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    mask_token: int | None
    num_drafts: int | None
    logit_scale: float
    ties_output: bool


def read_eagle_config(path: Path, fields: Fields, target: TargetShape) -> EagleConfig:
    """Raises ValueError, with the numbers, for a head that is not made for the target, or that is none of EAGLE-3."""
    return _Reader(path, fields).read(target)


class _Reader:
    def __init__(self, path: Path, fields: Fields) -> None:
        self._path, self._top = path, fields
        inner = fields.get("transformer_layer_config")
        self._is_speculators = "speculators_model_type" in fields or isinstance(inner, dict)
        self._layer: Fields = inner if isinstance(inner, dict) else fields
        eagle = fields.get("eagle_config")
        self._eagle: Fields = eagle if isinstance(eagle, dict) else {}

    def read(self, target: TargetShape) -> EagleConfig:
        self._check_kind()
        hidden_size, num_heads = self._count("hidden_size"), self._count("num_attention_heads")
        num_kv_heads = self._count("num_key_value_heads", num_heads)
        head_dim = self._count("head_dim", max(hidden_size // num_heads, 1))
        if num_heads % num_kv_heads or head_dim % 2:
            raise self._error(f"it has {num_heads} heads of {head_dim}, and {num_kv_heads} of keys")
        vocab_size = self._count("vocab_size")
        self._check_target("tokens in their vocabulary", vocab_size, target.vocab_size)
        target_hidden_size = self._count("target_hidden_size", hidden_size)
        self._check_target("features in their hidden states", target_hidden_size, target.hidden_size)
        return EagleConfig(
            hidden_size=hidden_size,
            target_hidden_size=target_hidden_size,
            intermediate_size=self._count("intermediate_size"),
            num_layers=self._num_layers(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=self._number("rms_norm_eps", 1e-6),
            rope=self._rope(head_dim),
            window=self._window(),
            vocab_size=vocab_size,
            draft_vocab_size=self._count("draft_vocab_size", vocab_size),
            hidden_layers=self._hidden_layers(target.num_layers),
            norm_before_residual=self._flag("norm_before_residual", default=self._is_speculators),
            norm_before_fc=self._flag("norm_before_fc"),
            fc_norm=self._flag("fc_norm"),
            norm_output=self._flag("norm_output"),
            mask_token=self._mask_token(vocab_size),
            num_drafts=self._num_drafts(),
            logit_scale=self._number("logit_scale", 1.0),
            ties_output=self._flag("tie_word_embeddings"),
        )

    def _check_kind(self) -> None:
        for name in ("quantization_config", "compression_config"):
            if self._top.get(name) or self._layer.get(name):
                raise self._error(f"config.json has a {name}, and only heads in floating point can be read")
        kind = self._top.get("speculators_model_type", "eagle3")
        if kind not in ("eagle3", "peagle"):
            raise self._error(f"it is a {kind!r} of speculators, and this method reads EAGLE-3 and P-EAGLE")
        activation = self._layer.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self._error(f"hidden_act is {activation!r}, and only silu can be computed")

    def _check_target(self, what: str, own: int, targets: int) -> None:
        if own != targets:
            raise self._error(
                f"the head is for models with {own:,} {what}, but this one has {targets:,}: it belongs to another model"
            )

    def _num_layers(self) -> int:
        number = self._count("num_hidden_layers", 1)
        if number > _MAX_LAYERS:
            raise self._error(f"it has {number} layers, and no head has more than {_MAX_LAYERS}")
        return number

    def _hidden_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose inputs are fused.

        At the top of a config they are named as such (vLLM, speculators); in `eagle_config`, those whose outputs are
        (SpecForge, SGLang, ModelOpt). Where none are named: 2, L / 2 and L - 3.
        """
        if not self._flag("use_aux_hidden_state", default=True):
            return ()
        name = "eagle_aux_hidden_state_layer_ids"
        given, shift = self._top.get(name), 0
        if not given:
            given, shift = self._eagle.get(name), 1
        if not given:
            given, shift = [2, num_layers // 2, num_layers - 3], 0
        if not isinstance(given, list) or not all(type(layer) is int for layer in given):
            raise self._error(f"config.json has {name} {given!r}, which is no list of layers")
        layers = tuple(layer + shift for layer in given)
        odd = [layer for layer in layers if not 0 <= layer < num_layers]
        if odd:
            raise self._error(
                f"it reads the inputs of layers {', '.join(map(str, layers))}, but the model has layers 0 to "
                f"{num_layers - 1}: it belongs to another model"
            )
        return layers

    def _mask_token(self, vocab_size: int) -> int | None:
        for name in _MASK_TOKEN_FIELDS:
            found = self._top.get(name, self._layer.get(name))
            if found is None:
                continue
            if type(found) is not int or not 0 <= found < vocab_size:
                raise self._error(f"config.json has {name} {found!r}, which is no token of {vocab_size:,}")
            return found
        return None

    def _num_drafts(self) -> int | None:
        """Speculators say how many tokens a head was trained to propose."""
        config = self._top.get("speculators_config")
        methods = config.get("proposal_methods") if isinstance(config, dict) else None
        first = methods[0] if isinstance(methods, list) and methods else None
        number = first.get("speculative_tokens") if isinstance(first, dict) else None
        return number if type(number) is int and 1 <= number <= 32 else None

    def _window(self) -> int | None:
        kinds = self._layer.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or len(set(map(str, kinds))) > 1:
            raise self._error(f"its layers attend in different ways ({kinds}), which is not known of any head")
        if kinds[0] == "full_attention":
            return None
        if kinds[0] != "sliding_attention" or not self._layer.get("sliding_window"):
            raise self._error(f"its layers have {kinds[0]!r}, which cannot be computed")
        return self._count("sliding_window")

    def _rope(self, head_dim: int) -> Rope:
        parameters: dict[str, object] = {"rope_theta": self._layer.get("rope_theta") or 10000.0}
        for name in ("rope_scaling", "rope_parameters"):
            given = self._layer.get(name)
            parameters |= given if isinstance(given, dict) else {}
        rope_type = str(parameters.get("rope_type") or parameters.get("type") or "default")
        parameters["rope_type"] = rope_type
        positions = self._count("max_position_embeddings", _MAX_POSITIONS)
        try:
            if rope_type == "default":
                return default_rope(float(cast(float, parameters["rope_theta"])), head_dim)
            sizes = {"head_dim": head_dim, "max_position_embeddings": positions}
            sizes |= {name: self._count(name) for name in ("hidden_size", "num_attention_heads")}
            config = BareConfig(model_type="llama", rope_parameters=parameters, **sizes)
            return scaled_rope(config, rope_type, layer_type=None, max_model_len=positions)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise self._error(f"config.json has a rotation that cannot be computed: {error}") from error

    def _find(self, name: str) -> object:
        """A field of the layer's config, or of the head's."""
        for fields in (self._top, self._layer, self._eagle):
            if fields.get(name) is not None:
                return fields[name]
        return None

    def _flag(self, name: str, *, default: bool = False) -> bool:
        value = self._find(name)
        if not isinstance(value, bool | None):
            raise self._error(f"config.json has {name} {value!r}, but it must be true or false")
        return default if value is None else value

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._find(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self._error(f"config.json has {name} {value!r}, but it must be a positive number")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._find(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._error(f"config.json has {name} {value!r}, which is no positive number")
        return float(value)

    def _error(self, reason: str) -> ValueError:
        return drafter_error(self._path, reason)
