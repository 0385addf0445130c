"""By which method a checkpoint says that its weights are quantised, wherever it says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.loading.json_file import JsonObject, read_json_object
from engine.loading.stored_weights import StoredTensor

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_KEYS = ("quantization_config", "compression_config")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ, of old
_MODELOPT = "hf_quant_config.json"
_MOST_BITS = 8


@dataclass(frozen=True, slots=True)
class Scheme:
    """method: in lower case, as transformers names them; fields: its config; place: where that stands, for people"""

    method: str
    fields: JsonObject = field(default_factory=dict)
    place: str = "the names of its tensors"

    def integer(self, *names: str) -> int | None:
        """The first of these fields that is there. ValueError if it is no whole number."""
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{self.place} says {name} {str(value)[:40]!r}, which is no whole number")
            return value
        return None

    def bits(self, *names: str) -> int | None:
        value = self.integer(*names)
        if value is not None and not 1 <= value <= _MOST_BITS:
            raise ValueError(f"{self.place} says {names[0]} {value}, but weights have 1 to {_MOST_BITS}")
        return value

    @property
    def has_overrides(self) -> bool:
        """Whether layers may have other bits and groups than the config says of all."""
        return bool(self.fields.get("dynamic") or self.fields.get("extra_config"))

    @property
    def rounds_activations(self) -> bool:
        """Whether the config asks for activations of fewer bits, whose scales are computed as they come."""
        groups = self.fields.get("config_groups")
        parts: list[object] = list(groups.values()) if isinstance(groups, dict) else []
        asked = any(part.get("input_activations") for part in parts if isinstance(part, dict))
        return asked or "activation_scheme" in self.fields or self.method == "fbgemm_fp8"

    def text(self, *names: str) -> str:
        """The first of these fields that is there, in lower case; empty if none is."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                return str(value)[:80].lower()
        return ""

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        return value if isinstance(value, bool) else default


def find_scheme(config: JsonObject, directory: Path, stored: Mapping[str, StoredTensor]) -> Scheme | None:
    """None of a checkpoint that is not quantised, as far as its config and its names tell. config: of config.json

    ValueError for what is quantised by MLX, whose config looks like another's.
    """
    _refuse_mlx(config, stored)
    places: list[object] = [config, *(config.get(name) for name in _TEXT_CONFIGS)]
    for place in places:
        for key in _KEYS:
            fields = place.get(key) if isinstance(place, dict) else None
            if isinstance(fields, dict) and fields:
                return _scheme(fields, f"config.json's {key}")
    if (directory / _MODELOPT).is_file():
        fields = read_json_object(directory / _MODELOPT).get("quantization")
        if isinstance(fields, dict):
            return Scheme("modelopt", fields, _MODELOPT)
    for name, method in _FILES.items():
        if (directory / name).is_file() and _has(stored, "qweight"):
            return Scheme(method, read_json_object(directory / name), name)
    return Scheme(_packed_method(stored)) if _has(stored, "qweight") and _has(stored, "qzeros") else None


def _scheme(fields: JsonObject, place: str) -> Scheme:
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None and "config_groups" in fields:
        method = "compressed-tensors"
    name = str(method)[:80].lower()
    return Scheme(_layout_of_auto_round(fields) if name.endswith("auto-round") else name, fields, place)


def _layout_of_auto_round(fields: JsonObject) -> str:
    """AutoRound writes others' layouts (auto_round:auto_gptq), and one of its own."""
    layout = str(fields.get("packing_format"))[:80].lower()
    known = [method for method in ("gptq", "awq") if layout.endswith(f"auto_{method}")]
    return known[0] if known else f"auto-round, as {layout}"


def _has(stored: Mapping[str, StoredTensor], kind: str) -> bool:
    return any(name.endswith(f".{kind}") for name in stored)


def _packed_method(stored: Mapping[str, StoredTensor]) -> str:
    """AWQ's words hold outputs, so that there are fewer words in a row than scales; GPTQ's hold inputs."""
    for name, tensor in stored.items():
        scales = stored.get(name.removesuffix("qweight") + "scales")
        if name.endswith(".qweight") and scales is not None and len(tensor.shape) == len(scales.shape) == 2:
            return "awq" if tensor.shape[1] < scales.shape[1] else "gptq"
    return "gptq"


def _refuse_mlx(config: JsonObject, stored: Mapping[str, StoredTensor]) -> None:
    fields = config.get("quantization")
    is_mlx = isinstance(fields, dict) and "bits" in fields and "quant_method" not in fields
    if is_mlx or any(name.endswith(".weight") and tensor.dtype == "U32" for name, tensor in stored.items()):
        raise ValueError(
            "the checkpoint's weights are quantised by MLX, for Apple's processors, which is not supported; use the "
            "original checkpoint, with model.quantization if its weights are to be small"
        )
