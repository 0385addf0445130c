"""What becomes of the formats in which a checkpoint has matrices quantised: which kernel multiplies them, and why."""

from __future__ import annotations

from engine.loading.model_facts import ModelFacts, StoredKind
from engine.quantization.method import COMPILED_FORMATS, most_stored
from kernels.numba.core.formats import FLOAT8, NAMES, SIZES

_MOST_BITS = {"stored": 8, "int8": 8, "int4": 4}  # that are kept as they are, by `model.quantization`
_MOST_NAMES = 8  # of kinds of layer in one line


def stored_notes(facts: ModelFacts, *, kernels: str, quantization: str, dtype: str) -> list[str]:
    """A line for each format and fate, with the kinds of layer. kernels, quantization, dtype: as resolved"""
    layers: dict[tuple[str, str], list[str]] = {}
    for kind in facts.stored:
        if kernels == "numba":
            fate = _compiled(kind, quantization)
        elif kernels == "triton" and quantization in _MOST_BITS:
            fate = _on_gpu(quantization, dtype)
        else:
            fate = _other(kernels, quantization, dtype)
        layers.setdefault((kind.label, fate), []).append(
            kind.name if kind.num_layers == 1 else f"{kind.name} ({kind.num_layers})"
        )
    return [f"stored as {label}: {_some(names)}; {fate}" for (label, fate), names in layers.items()]


def _compiled(kind: StoredKind, quantization: str) -> str:
    most = COMPILED_FORMATS[quantization].num_bytes
    if most is None:
        return "kept as floats that hold every weight, since model.quantization is none"
    if kind.kept_in is not None and most_stored(most) >= SIZES[kind.kept_in]:
        tiles = "float" if kind.kept_in == FLOAT8 else "integer"
        return f"kept as {NAMES[kind.kept_in]}, multiplied by compiled {tiles} tiles"
    if most >= 2:
        return f"kept as floats of 16 bits, multiplied by compiled float tiles: {kind.why_float}"
    why = f": {kind.why_float}" if kind.why_float else ""
    return f"rounded to {quantization}, as model.quantization asks{why}"


def _on_gpu(quantization: str, dtype: str) -> str:
    others = dtype if quantization == "stored" else quantization
    most = _MOST_BITS[quantization]
    return f"integers, FP8 and FP4 of up to {most} bits stay as they are, in Triton's products; others become {others}"


def _other(kernels: str, quantization: str, dtype: str) -> str:
    kept = dtype if quantization == "none" else quantization
    return f"becomes {kept} matrix by matrix while it is loaded: {kernels} layers read no stored integers"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
