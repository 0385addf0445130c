"""What a config.json says of quantised matrices, in the fields and the order of the compressed-tensors library.

Layers are named by patterns: those of one name and one format are one, so that a model of experts takes a few lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from engine.compression.weight_scheme import WeightScheme

Fields = dict[str, object]

VERSION = "0.20.0"  # of the library that this is written after
_PACKED, _FLOATS, _MIXED = "pack-quantized", "float-quantized", "mixed-precision"
_PLACE = "<number>"  # of a layer, in a pattern


def quantization_config(schemes: Mapping[str, WeightScheme], ignored: list[str]) -> Fields:
    """schemes: of each quantised layer, by its name; ignored: names of layers that are not."""
    kinds: dict[WeightScheme, list[str]] = {}
    for module, scheme in schemes.items():
        kinds.setdefault(scheme, []).append(module)
    names = {scheme: ["Linear"] for scheme in kinds} if len(kinds) == 1 else _patterns(kinds)
    groups = {f"group_{index}": _group(scheme, names[scheme]) for index, scheme in enumerate(kinds)}
    formats = {_format(scheme) for scheme in kinds}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _format(scheme: WeightScheme) -> str:
    return _FLOATS if scheme.is_float else _PACKED


def _group(scheme: WeightScheme, targets: list[str]) -> Fields:
    return {
        "format": _format(scheme),
        "input_activations": _activations() if scheme.is_float else None,
        "output_activations": None,
        "targets": targets,
        "weights": _weights(scheme),
    }


def _weights(scheme: WeightScheme) -> Fields:
    return {
        "dynamic": False,
        "group_size": scheme.group_size,
        "num_bits": scheme.bits,
        "observer": scheme.observer,
        "strategy": "channel" if scheme.group_size is None else "group",
        "symmetric": scheme.is_symmetric,
        "type": "float" if scheme.is_float else "int",
    }


def _activations() -> Fields:
    """FP8 is multiplied by FP8: each row of activations gets a scale as it comes."""
    return {
        "dynamic": True,
        "group_size": None,
        "num_bits": 8,
        "strategy": "token",
        "symmetric": True,
        "type": "float",
    }


def _patterns(kinds: Mapping[WeightScheme, list[str]]) -> dict[WeightScheme, list[str]]:
    """A pattern for the layers of each name: of all layers, or of those whose numbers it lists."""
    layers: dict[str, dict[WeightScheme, set[int]]] = {}  # by name with its number left out
    for scheme, modules in kinds.items():
        for module in modules:
            name, number = _without_number(module)
            layers.setdefault(name, {}).setdefault(scheme, set()).add(number)
    found: dict[WeightScheme, list[str]] = {scheme: [] for scheme in kinds}
    for name, by_scheme in layers.items():
        for scheme, numbers in by_scheme.items():
            listed = r"\d+" if len(by_scheme) == 1 else f"({'|'.join(map(str, sorted(numbers)))})"
            found[scheme].append(f"re:{name.replace(_PLACE, listed)}$")
    return found


def _without_number(module: str) -> tuple[str, int]:
    """A pattern with a place for the layer's number, and any other number in it; and the layer's, -1 without one."""
    number, parts = -1, []
    for part in module.split("."):
        if not part.isdecimal():
            parts.append(re.escape(part))
        elif number < 0:
            number = int(part)
            parts.append(_PLACE)
        else:
            parts.append(r"\d+")
    return r"\.".join(parts), number
