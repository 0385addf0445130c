"""Which Triton kernel each part of a step runs, in words, for `peregrine doctor`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch

from engine.lazy_import import load_object
from engine.quantization.method import TRITON_FORMATS

TRITON_PARTS = {
    "attention": "kernels.triton.attention.paged_attention:paged_attention",
    "store": "kernels.triton.layers.store_kv:store_kv",
    "norm": "kernels.triton.layers.norm:add_rms_norm",
    "activation": "kernels.triton.layers.activation:silu_and_mul",
    "qkv": "kernels.triton.layers.qkv:rotate_and_store",
    "sampling": "kernels.triton.sampling.sample_tokens:sample_tokens",
    "truncation": "kernels.triton.sampling.truncate:truncate",
    "moe": "kernels.triton.layers.moe:mix_experts",
    "quantized": "kernels.triton.quantized.linear:quantized_linear",
    "scaled": "kernels.triton.quantized.scaled:scaled_linear",
    "quantized_moe": "kernels.triton.layers.quantized_moe:mix_quantized_experts",
}
_TUNED = ("attention", "moe", "quantized", "scaled", "quantized_moe")  # parts with tables of tile shapes


def describe_triton_kernels(device: torch.device, dtype: torch.dtype, *, quantization: str = "none") -> dict[str, str]:
    """A line for each part of a model in `dtype` on this device, linear layers first.

    Every kernel is looked up, so that an installation that lacks one says so here.
    """
    from kernels.triton.compat import INTERPRET  # only where Triton is to be used: it need not be installed

    mode = "Triton's interpreter, slow" if INTERPRET else "Triton"
    library = "cuBLAS" if device.type == "cuda" else "the CPU"
    meaning = TRITON_FORMATS[quantization].meaning
    torchs = f"torch's {str(dtype).removeprefix('torch.')} products, on {library}"
    parts = {"linear": f"{mode}; weights as {meaning}" if meaning else torchs}
    for part, place in TRITON_PARTS.items():
        tiles = f"; tiles {_provenance(device)}" if part in _TUNED else ""
        parts[part] = f"{mode}: {_find(place)}{tiles}"
    return parts


def _find(place: str) -> str:
    try:
        found = cast(Callable[..., object], load_object(place))
    except (ImportError, AttributeError) as error:
        return f"MISSING, {error}"
    function = inspect.unwrap(getattr(found, "fn", found))  # of what triton.jit wraps
    return f"{place.partition(':')[2]}, {function.__module__.replace('.', '/')}.py"


def _provenance(device: torch.device) -> str:
    from kernels.triton.configs import chip_of, provenance

    text: str = provenance(chip_of(device))
    return text
