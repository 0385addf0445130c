"""Tile shapes of the kernels, by chip. They are read from a table once per process; nothing is tuned while serving.

`kernels/configs/default.json` holds values chosen by reasoning and by what compiles without spills; a file named for a
chip ("sm_90.json") wins over it; `python -m loadtest.gpu tune` measures and writes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels.triton.compat import next_power_of_2

_FOLDER = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Tile shapes of paged attention. The first two also decide in which order scores are summed."""

    split_size: int = 256  # tokens of context per split, a multiple of decode_keys
    max_split_queries: int = 16  # a sequence with more new tokens is computed by the prompt kernel
    decode_rows: int = 16  # (query, head) pairs per tile of the split kernel
    decode_keys: int = 64  # tokens of context per step of the loop
    decode_warps: int = 4
    decode_stages: int = 5
    prompt_rows: int = 128
    prompt_keys: int = 64
    prompt_warps: int = 8
    prompt_stages: int = 3


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Tile shapes of the grouped products of a mixture of experts."""

    rows: int = 64  # pairs of a token and an expert
    columns: int = 64
    step: int = 64  # of the inner dimension
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True, slots=True)
class QuantizedConfig:
    """Tile shapes of quantised products; `columns` and `programs` decide in which order inputs are summed."""

    rows: int = 16
    columns: int = 64
    warps: int = 4
    stages: int = 4
    programs: int = 512  # that are wanted at least: tiles of fewer are split along their inputs


def attention_config(
    head_dim: int, group: int, dtype: torch.dtype, *, chip: str, has_codes: bool = False
) -> AttentionConfig:
    """The measured config of this chip, or the default one. A tile must hold a group of query heads.

    has_codes: the cache has 8 bits, which take registers until they are numbers: its tiles may be smaller

    Where the group needs larger tiles than the table has, the defaults replace what was measured with the smaller ones,
    which might not fit into shared memory.
    """
    config, plain = (
        _attention_config(f"{head_dim}", f"{dtype}".removeprefix("torch."), name, has_codes=has_codes)
        for name in (chip, "default")
    )
    rows = next_power_of_2(group)
    if rows > config.decode_rows:
        keys, stages, warps = plain.decode_keys, plain.decode_stages, max(plain.decode_warps, rows // 16)
        config = replace(config, decode_rows=rows, decode_keys=keys, decode_stages=stages, decode_warps=warps)
    if rows > config.prompt_rows:
        keys, stages, warps = plain.prompt_keys, plain.prompt_stages, max(plain.prompt_warps, rows // 16)
        config = replace(config, prompt_rows=rows, prompt_keys=keys, prompt_stages=stages, prompt_warps=warps)
    return config


def _attention_config(shape: str, dtype: str, chip: str, *, has_codes: bool) -> AttentionConfig:
    config = AttentionConfig(**_lookup("attention", shape, dtype, chip))
    return replace(config, **_lookup("attention_on_codes", shape, dtype, chip)) if has_codes else config


def moe_config(pairs_per_expert: int, dtype: torch.dtype, *, chip: str) -> MoeConfig:
    """The measured config of this chip, or the default one. With few pairs, small tiles read the weights just as fast.

    pairs_per_expert: of a token and an expert, on average
    """
    bucket = "few" if pairs_per_expert < 32 else "many"
    return MoeConfig(**_lookup("moe", bucket, f"{dtype}".removeprefix("torch."), chip))


def quantized_config(num_rows: int, dtype: torch.dtype, *, chip: str) -> QuantizedConfig:
    """The measured config of this chip, or the default one, by the number of rows: a batch that decodes, or prompts."""
    bucket = "few" if num_rows <= 16 else "some" if num_rows <= 64 else "many"
    return QuantizedConfig(**_lookup("quantized", bucket, f"{dtype}".removeprefix("torch."), chip))


def strict_quantized_config(dtype: torch.dtype, *, chip: str) -> QuantizedConfig:
    """One config for any number of rows, so that a row's result depends on the row alone."""
    return QuantizedConfig(**_lookup("quantized", "some", f"{dtype}".removeprefix("torch."), chip))


def scaled_config(num_rows: int, *, chip: str) -> QuantizedConfig:
    """Of products whose rows are quantised as well."""
    return QuantizedConfig(**_lookup("scaled", "few" if num_rows <= 64 else "many", "any", chip))


def strict_scaled_config(*, chip: str) -> QuantizedConfig:
    """One config for any number of rows, as `strict_quantized_config`."""
    return scaled_config(1, chip=chip)


def quantized_moe_config(pairs_per_expert: int, dtype: torch.dtype, *, chip: str) -> MoeConfig:
    """Of experts whose matrices are quantised."""
    bucket = "few" if pairs_per_expert < 32 else "many"
    return MoeConfig(**_lookup("quantized_moe", bucket, f"{dtype}".removeprefix("torch."), chip))


def chip_of(device: torch.device) -> str:
    """The name that the device's table has: "sm_90" for an H100 or H200. The tuner writes to it."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def provenance(chip: str) -> str:
    """Where the chip's tile shapes come from, in words."""
    return f"of {chip}.json ({_text(chip)})" if _table(chip) else f"of default.json ({_text('default')})"


def table_digest(chip: str) -> str:
    """Changes with any tile shape of the chip, and so with the order in which its kernels sum."""
    tables = [json.dumps(_table(name), sort_keys=True) for name in (chip, "default")]
    return hashlib.sha256("\n".join(tables).encode()).hexdigest()


def _text(name: str) -> str:
    text: str = json.loads((_FOLDER / f"{name}.json").read_text())["provenance"]
    return text


def _lookup(kernel: str, shape: str, dtype: str, chip: str) -> dict[str, int]:
    """The closest entry: for shape and dtype, for one of them, for any; each time of the chip before the default."""
    for key in (f"{shape} {dtype}", dtype, shape, "any"):
        for name in (chip, "default"):
            entry = _table(name).get(kernel, {}).get(key)
            if entry is not None:
                return entry
    raise AssertionError(f"kernels/configs/default.json has no entry for {kernel}")


@functools.cache
def _table(name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = _FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    kernels: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text())["kernels"]
    return kernels
