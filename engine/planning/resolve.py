"""Resolves each "auto" of the config that depends on the machine: to a value, its source, and the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.config import EngineConfig
from engine.ipc.messages import Setting
from engine.kv_cache.codec import KV_CODECS
from engine.loading.model_facts import ModelFacts, StoredKind
from engine.planning.machine import Machine
from engine.quantization.method import formats_of
from kernels.layout import PANEL

T = TypeVar("T", str, int)

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_MAX_NUM_SEQS = {"cpu": 32, "cuda": 256}  # where nobody set them
_GPU_BATCHED_TOKENS = 8192
_CPU_BATCHED_TOKENS = (64, 512)  # least and most; fewer would leave too little beside 32 decoding sequences
_CPU_STEP_SECONDS = 0.125  # of a step that is full of prompt tokens
_CPU_EFFICIENCY = 0.8  # of the machine's ceiling that a step is assumed to reach until steps were measured
_BFLOAT16_REASON = (
    "this CPU multiplies bfloat16 by bfloat16: activations are rounded to it where they meet weights, and summed in "
    "float32; a perplexity changes by less than 0.1% (docs/performance.md); float32 rounds nothing"
)
KV_ALIASES = {"fp8_e4m3": "fp8"}  # vLLM's spelling
_SCALED = {
    "int8": "with a scale of each token and head: a 254th of its largest element is the most that one is off",
    "fp8": "e4m3, with a scale of each token and head: elements round by 2^-4 of themselves or less",
}
_FP8_CAPABILITY = (8, 9)
_CPU_FLOPS = 80e9  # of one thread, with AVX2: where nothing was measured


class SettingError(ValueError):
    """A setting that this machine or model cannot honour; the text has the fix."""

    kind = "config"


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    value: T
    source: str
    reason: str = ""

    @property
    def setting(self) -> Setting:
        return Setting(self.value, self.source, self.reason)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What `kv_cache.memory` asks for: exactly one of the three, or none for auto."""

    fraction: float | None = None  # of the device's memory, weights included
    num_bytes: int | None = None
    num_tokens: int | None = None


def resolve_device(config: EngineConfig, machine: Machine) -> Resolved[str]:
    if config.device.name == "auto":
        return Resolved(machine.device, "measured", "what this machine has")
    if config.device.name == "cuda" and machine.device != "cuda":
        raise SettingError("device.name is cuda, but torch sees no GPU here; set it to auto or cpu")
    return Resolved(config.device.name, "config")


def limit_instructions(level: str) -> None:
    """Makes compiled kernels of this process use the vector instructions of `device.cpu_features`, and no others.

    SettingError where the processor has fewer, or where kernels are compiled already, for another level.
    """
    if level == "auto":
        return
    from kernels.numba.core import processor

    try:
        processor.limit_to(level)
    except ValueError as error:
        raise SettingError(f"device.cpu_features is {level}, but {error}; set it to auto") from None


def resolve_num_threads(config: EngineConfig, machine: Machine) -> Resolved[int]:
    if config.device.num_threads != "auto":
        return Resolved(config.device.num_threads, "config")
    return Resolved(machine.num_threads, "measured", "cores that this process may use")


def resolve_dtype(
    config: EngineConfig, machine: Machine, device: str, kernels: str, *, is_bfloat16: bool = False
) -> Resolved[str]:
    """The dtype of activations where they meet weights, and of weights that nothing quantises. is_bfloat16: of the
    checkpoint's
    """
    if config.model.dtype != "auto":
        return Resolved(config.model.dtype, "config")
    if kernels == "numba":
        has_products = machine.has_fast_bf16 and config.device.cpu_features in ("auto", "avx512-bf16")
        if has_products and is_bfloat16 and config.model.quantization in ("auto", "none", "fp16"):
            return Resolved("bfloat16", "measured", _BFLOAT16_REASON)
        return Resolved("float32", "default", "compiled layers compute in float32, whatever the weights are kept in")
    if device == "cuda":
        return Resolved("bfloat16", "default", "what the GPU computes fastest")
    if machine.has_fast_bf16:
        return Resolved("bfloat16", "measured", "this CPU multiplies bfloat16 in hardware")
    return Resolved("float32", "measured", "this CPU has no instructions for bfloat16")


def resolve_kernels(config: EngineConfig, device: str, why_not_compiled: str) -> Resolved[str]:
    """Resolves `device.kernels`. Triton needs a GPU, or the slow interpreter that TRITON_INTERPRET=1 asks for.

    why_not_compiled: of the model
    """
    wanted = config.device.kernels
    block_size = config.kv_cache.block_size
    if device == "cpu" and block_size % PANEL and not why_not_compiled and wanted in ("auto", "numba"):
        nearest = max(PANEL, round(block_size / PANEL) * PANEL)
        raise SettingError(
            f"kv_cache.block_size is {block_size}, but the compiled layers of a CPU take multiples of {PANEL}; set it "
            f"to {nearest}, or device.kernels to torch, which is several times slower"
        )
    if wanted == "auto":
        if device == "cuda":
            return Resolved("triton", "default", "for cuda")
        if why_not_compiled:
            return Resolved("torch", "model", f"no compiled layers for {why_not_compiled}")
        return Resolved("numba", "default", "for cpu")
    if wanted == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SettingError('device.kernels is triton, but there is no GPU to run it on; set it to "auto" or "torch"')
    if wanted == "numba" and (device != "cpu" or why_not_compiled):
        problem = why_not_compiled or "a GPU"
        raise SettingError(f'device.kernels is numba, which cannot run {problem}; set it to "auto" or "torch"')
    return Resolved(wanted, "config")


def resolve_quantization(
    config: EngineConfig, machine: Machine, device: str, kernels: str, dtype: str, stored: Sequence[StoredKind] = ()
) -> Resolved[str]:
    """The weight format. With `model.dtype` set, or "none", weights are exactly the model's. `dtype`: as resolved.

    stored: what the checkpoint has quantised
    """
    asked = config.model.quantization
    formats = formats_of(kernels)
    if config.model.activations != "int16" and kernels != "numba":
        raise SettingError(
            f"model.activations is {config.model.activations}, which only compiled CPU layers have, but device.kernels "
            f"is {kernels} here; set it to int16"
        )
    if asked != "auto":
        if asked not in formats:
            names = ", ".join(formats)
            raise SettingError(f"model.quantization is {asked!r}; supported with {kernels} kernels are auto, {names}")
        return Resolved(asked, "config", formats[asked].meaning if kernels == "triton" else "")
    if config.model.dtype != "auto":
        return Resolved("none", "default", f"model.dtype is set to {config.model.dtype}")
    if kernels == "triton" and stored:
        return Resolved("stored", "model", formats["stored"].meaning)
    if device != "cpu":
        return Resolved("none", "default", "the GPU multiplies the model's own dtype fastest")
    if kernels == "numba":
        return Resolved("fp16", "default", "or what is smaller and holds each weight exactly")
    if machine.has_fast_bf16 or dtype != "float32":
        return Resolved("none", "measured", f"this CPU multiplies {dtype} in hardware")
    if not machine.has_float16_weights:
        return Resolved("none", "measured", "this torch build has no products with float16 weights")
    return Resolved(
        "fp16", "measured", "half the bytes and 2 to 5 times the speed here; weights round by 2^-11 or less"
    )


def resolve_kv_dtype(
    config: EngineConfig, machine: Machine, facts: ModelFacts, *, device: str, dtype: str, kernels: str
) -> Resolved[str]:
    """A key of KV_CODECS. device, dtype, kernels: as resolved"""
    asked = config.kv_cache.dtype
    if asked == "auto":
        if kernels == "numba" and (config.model.dtype == "auto" or dtype == "bfloat16"):
            return Resolved("float16", "default", "half the bytes of float32; keys and values round by 2^-11 or less")
        return Resolved(dtype, "model", "as the weights")
    name = KV_ALIASES.get(asked, asked)
    if name not in KV_CODECS:
        raise SettingError(f"kv_cache.dtype is {asked!r}; supported are auto, {', '.join(KV_CODECS)}")
    if name not in _SCALED:
        return Resolved(name, "config")
    uneven = next((layer.head_dim for layer in facts.attention_layers if layer.head_dim % 4), None)
    if uneven is not None:
        raise SettingError(
            f"kv_cache.dtype is {asked}, which heads of a multiple of 4 elements have; this model's have {uneven}: set "
            "it to auto"
        )
    if name == "fp8" and kernels != "triton":
        raise SettingError(
            f"kv_cache.dtype is {asked}, which only Triton's kernels read, but device.kernels is {kernels} here; set "
            "it to int8, which takes as many bytes and rounds less"
        )
    if name == "fp8" and device == "cuda" and machine.gpu and machine.gpu.compute_capability < _FP8_CAPABILITY:
        raise SettingError(
            f"kv_cache.dtype is {asked}, but {machine.gpu.name} has no 8-bit floats (compute capability 8.9 has); set "
            "it to int8, which takes as many bytes and rounds less"
        )
    return Resolved(name, "config", _SCALED[name])


def resolve_limits(
    config: EngineConfig, device: str, facts: ModelFacts, *, step_rate: Resolved[int]
) -> tuple[Resolved[int], Resolved[int]]:
    """(max_num_seqs, max_num_batched_tokens). An "auto" adapts to the other one where that is set.

    On a CPU, a step with a prompt in it holds up the tokens of all others, and so is kept to what the machine computes
    in about an eighth of a second: larger ones are no faster.

    step_rate: as `resolve_step_rate` has it
    """
    seqs, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    default_seqs, default_tokens, reason = _MAX_NUM_SEQS[device], _GPU_BATCHED_TOKENS, f"for {device}"
    if device == "cpu":
        affordable = int(_CPU_STEP_SECONDS * step_rate.value / facts.flops_per_token)
        least, most = _CPU_BATCHED_TOKENS
        default_tokens = min(most, max(least, affordable // PANEL * PANEL))
        reason = f"a prompt delays other answers by about {_CPU_STEP_SECONDS:g} s: {step_rate.reason}"
    if seqs == "auto":
        value = default_seqs if tokens == "auto" else min(default_seqs, tokens)
        max_num_seqs = Resolved(value, "default", f"for {device}")
    else:
        max_num_seqs = Resolved(seqs, "config")
    if tokens == "auto":
        return max_num_seqs, Resolved(max(default_tokens, max_num_seqs.value), "default", reason)
    if tokens < max_num_seqs.value:
        raise SettingError(
            f"scheduler.max_num_batched_tokens is {tokens}, but scheduler.max_num_seqs is {max_num_seqs.value}: each "
            "running request needs a token per step; raise the first or lower the second"
        )
    return max_num_seqs, Resolved(tokens, "config")


def resolve_step_rate(machine: Machine, step_name: str, *, num_threads: int) -> Resolved[int]:
    """Operations per second of a step full of prompt tokens, as measured, or else estimated.

    step_name: of this model's steps, as `step_name` makes it
    """
    learned = int(machine.ceilings.step_flops_per_second.get(step_name, 0.0))
    if learned:
        return Resolved(learned, "measured", f"steps of this model reach {learned / 1e9:,.0f} GFLOP/s here")
    if machine.ceilings.flops_per_second:
        share = _CPU_EFFICIENCY * min(1.0, num_threads / machine.num_threads)
        reason = f"{_CPU_EFFICIENCY:g} of this machine's best, until steps of this model have told"
        return Resolved(int(machine.ceilings.flops_per_second * share), "measured", reason)
    rate = int(num_threads * _CPU_FLOPS)
    return Resolved(rate, "default", "as with AVX2, of which this machine was not asked")


def step_name(
    facts: ModelFacts, kernels: str, quantization: str, activations: tuple[str, str], num_threads: int
) -> str:
    """The key of a measured step rate: everything that it depends on beside the machine. activations: what floats, and
    what integers are multiplied by
    """
    size = f"{facts.num_parameters} {facts.num_linear_parameters}"
    return f"{facts.architecture} {size} {kernels} {quantization} {' '.join(activations)} {num_threads}"


def parse_cache_size(text: str) -> CacheSize:
    """Reads "auto", "0.9", "2GiB" or "100000tokens"; SettingError for anything else."""
    if text == "auto":
        return CacheSize()
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(tokens|[KMGT]i?B|B)?", text.strip())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or (match[2] is None and number > 1):
        raise SettingError(
            f'kv_cache.memory is {text!r}; write a fraction of the device ("0.9"), bytes ("2GiB"), tokens '
            '("100000tokens") or "auto"'
        )
    if match[2] is None:
        return CacheSize(fraction=number)
    if match[2] == "tokens":
        return CacheSize(num_tokens=int(number))
    return CacheSize(num_bytes=int(number * _UNITS[match[2]]))
