"""How each matrix of a packed model is kept, for people: settings say what was asked for, this says what it came to."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from engine.models.llama import TokenTable
from engine.models.model import Model
from engine.quantization.linear import KeptMatrix
from engine.runner.padded_rows import PaddedRows

KeptWeights = dict[str, dict[str, int]]  # by matrix, without the layer's number: format -> in how many layers

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_INNER = re.compile(r"\.module(?=\.|$)")  # what pads rows wraps the product


def kept_weights(model: Model) -> KeptWeights:
    """Of all matrices, tables and stacks of experts; vectors stay as they were built."""
    found: KeptWeights = {}
    for name, kept_as in _matrices(model):
        counts = found.setdefault(_NUMBER.sub("", _INNER.sub("", name)), {})
        counts[kept_as] = counts.get(kept_as, 0) + 1
    return found


def _matrices(model: Model) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, KeptMatrix):
            yield name, module.describe()
        elif isinstance(module, TokenTable) and module.table is not None:
            yield name, module.table.describe()
        elif not isinstance(module, PaddedRows):
            yield from _own_parameters(name, module)


def _own_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1:
            whole = name if parameter_name == "weight" else f"{name}.{parameter_name}"
            yield whole, _name_of(parameter.dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
