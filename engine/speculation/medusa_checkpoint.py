"""Medusa heads as their files have them (Cai et al. 2024, arXiv 2401.10774), of every layout that was published.

Whoever trained them, the arithmetic is one: for each head, x = x + SiLU(W x + b) in every layer of its block, then an
output matrix. x is the target's last normalised hidden state, and head h guesses the token h + 2 places further. Files
come from anybody, so nothing is believed before it is checked, and headers are read before tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.speculation.tensor_file import TensorFile, drafter_error, open_tensor_file, read_config

_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # beside what else lies there
_PREFIXES = ("medusa_heads.", "medusa_head.")
_REFERENCE = re.compile(r"(\d{1,4})\.(\d{1,4})\.(linear\.weight|linear\.bias|weight)")
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.layers\.(\d{1,4})\.(weight|bias)")
_OUTPUT = re.compile(r"lm_heads\.(\d{1,4})\.weight")
_NEWEST = re.compile(r"blocks\.(\d{1,4})\.newest\.weight")
_SINGLE = ("lm_head.weight", "token_map", "markov_w1.weight", "markov_w2.weight")
_MAX_HEADS, _MAX_LAYERS = 64, 16
_BYTES = 2  # of an element of the target's output matrix, at most

Layer = tuple[Tensor, Tensor | None]  # [hidden_size, hidden_size], [hidden_size]
Accuracies = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaCheckpoint:
    """blocks: of each head, its layers.
    outputs: [rows, hidden_size] of each head; a single one is shared; empty: the target's own
    token_map: [rows] the token of each row, where rows are not all of the vocabulary
    markov: [rows or vocabulary, rank] and [rows, rank]: the second times the first's row of the previous token is added
    newest: of each head, [hidden_size, rank] times the newest token's row of `markov[0]` is added to W x + b
    accuracies: how often the candidate of each rank was right, of each head, on text that was held out; empty: unknown
    """

    hidden_size: int
    blocks: list[list[Layer]]
    outputs: list[Tensor]
    token_map: Tensor | None
    markov: tuple[Tensor, Tensor] | None
    newest: list[Tensor]
    accuracies: Accuracies
    logit_scale: float


def read_medusa_checkpoint(path: Path, *, hidden_size: int, vocab_size: int) -> MedusaCheckpoint:
    """Reads a directory, or a file beside its config.json. ValueError, with what to do, for whatever does not fit."""
    config = _open_config(path)
    tensors = open_tensor_file(path, _FILES)
    names = _own_names(tensors.names(), path)
    reader = _Reader(path, config, tensors, names, hidden_size=hidden_size, vocab_size=vocab_size)
    return reader.read()


def medusa_bytes(path: Path, *, hidden_size: int, vocab_size: int) -> int:
    """What heads take in memory, at most, by the sizes of their files: with the rows of the target's output matrix that
    some have copies of. ValueError as `read_medusa_checkpoint` where there are none."""
    config = _open_config(path)
    files = [path, *path.glob("*")]
    copied = (config.num_rows or vocab_size) * hidden_size if config.uses_target_output else 0
    return sum(file.stat().st_size for file in files if file.is_file()) + _BYTES * copied


def _open_config(path: Path) -> _Config:
    if not path.exists():
        raise ValueError(f"there are no Medusa heads in {path}: it does not exist; name a directory that holds them")
    return _Config(path, read_config(path))


class _Config:
    """The fields of config.json that count. Heads and layers are counted from the tensors: old configs lie."""

    def __init__(self, path: Path, fields: Mapping[str, object]) -> None:
        self._path, self._fields = path, fields
        self.uses_target_output = self._flag("original_lm_head")
        self.wants_bias = self._flag("medusa_fc_bias")
        self.num_rows = self._count("truncated_vocab_size")
        scale = fields.get("logit_scale", 1.0)
        if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"{path}: config.json has logit_scale {scale!r}, which is no positive number")
        self.logit_scale = float(scale)

    def accuracies(self, num_heads: int) -> Accuracies:
        found = self._fields.get("peregrine_accuracies")
        if found is None:
            return ()
        rows = found if isinstance(found, list) else []
        numbers = [number for row in rows for number in (row if isinstance(row, list) else [None])]
        if len(rows) != num_heads or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers):
            raise ValueError(
                f"{self._path}: config.json has peregrine_accuracies that are not {num_heads} lists of numbers from 0 "
                "to 1; delete the field, or train the heads again"
            )
        return tuple(tuple(float(number) for number in row) for row in rows)

    def _flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if not isinstance(value, bool | None):
            raise ValueError(f"{self._path}: config.json has {name} {value!r}, but it must be true or false")
        return bool(value)

    def _count(self, name: str) -> int | None:
        value = self._fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{self._path}: config.json has {name} {value!r}, but it must be a positive number")
        return value


class _Reader:
    """Takes one checkpoint apart, whose tensors have `names`: own name -> name in the file."""

    def __init__(
        self,
        path: Path,
        config: _Config,
        tensors: TensorFile,
        names: Mapping[str, str],
        *,
        hidden_size: int,
        vocab_size: int,
    ) -> None:
        self._path, self._config, self._tensors, self._names = path, config, tensors, names
        self._hidden_size, self._vocab_size = hidden_size, vocab_size

    def read(self) -> MedusaCheckpoint:
        names = self._reference_blocks() if any(map(_REFERENCE.fullmatch, self._names)) else self._blocks()
        blocks = [[self._layer(*pair) for pair in block] for block in names]
        token_map = self._token_map()
        outputs = self._outputs(names, token_map)
        num_rows = self._vocab_size if token_map is None else len(token_map)
        markov = self._markov(num_rows)
        newest = self._newest(len(blocks), markov)
        return MedusaCheckpoint(
            hidden_size=self._hidden_size,
            blocks=blocks,
            outputs=outputs,
            token_map=token_map,
            markov=markov,
            newest=newest,
            accuracies=self._config.accuracies(len(blocks)),
            logit_scale=self._config.logit_scale,
        )

    def _reference_blocks(self) -> list[list[tuple[str, str | None]]]:
        """Names of weight and bias: FasterDecoding's `{head}.{layer}.linear.*`, and `{head}.{num_layers}.weight`.

        Its layers are one and the same module, so that files may hold the first of them alone.
        """
        outputs = {int(m[1]): int(m[2]) for m in self._matches(_REFERENCE) if m[3] == "weight"}
        self._check_numbers(outputs, "output matrices")
        blocks = []
        for head, num_layers in sorted(outputs.items()):
            if num_layers > _MAX_LAYERS:
                raise self._error(f"head {head} has {num_layers} layers, and none has more than {_MAX_LAYERS}")
            layers: list[tuple[str, str | None]] = []
            for layer in range(num_layers):
                kept = layer if f"{head}.{layer}.linear.weight" in self._names else 0
                layers.append((f"{head}.{kept}.linear.weight", f"{head}.{kept}.linear.bias"))
            blocks.append(layers)
        known = {name for layers in blocks for pair in layers for name in pair if name is not None}
        known |= {f"{head}.{layer}.weight" for head, layer in outputs.items()}
        self._check_unknown(known)
        return blocks

    def _blocks(self) -> list[list[tuple[str, str | None]]]:
        """Names of weight and bias: vLLM's `blocks.{head}.layers.{layer}.*`. Biases are kept where there are any."""
        layers_of: dict[int, set[int]] = {}
        for match in self._matches(_BLOCK):
            layers_of.setdefault(int(match[1]), set()).add(int(match[2]))
        self._check_numbers(layers_of, "blocks")
        blocks = []
        for head, layers in sorted(layers_of.items()):
            if sorted(layers) != list(range(len(layers))) or len(layers) > _MAX_LAYERS:
                raise self._error(f"block {head} has the layers {sorted(layers)[:20]}, but they must be 0, 1, ...")
            names = [f"blocks.{head}.layers.{layer}" for layer in sorted(layers)]
            blocks.append([(f"{name}.weight", self._bias_of(name)) for name in names])
        known = {name for block in blocks for pair in block for name in pair if name is not None}
        extra = (m[0] for pattern in (_OUTPUT, _NEWEST) for m in self._matches(pattern))
        self._check_unknown(known | set(_SINGLE) | set(extra))
        return blocks

    def _bias_of(self, layer: str) -> str | None:
        name = f"{layer}.bias"
        return name if name in self._names or self._config.wants_bias else None

    def _outputs(self, blocks: list[list[tuple[str, str | None]]], token_map: Tensor | None) -> list[Tensor]:
        num_heads = len(blocks)
        if any(map(_REFERENCE.fullmatch, self._names)):
            names = [f"{head}.{len(layers)}.weight" for head, layers in enumerate(blocks)]
        elif self._config.uses_target_output:
            shared = [name for name in ("lm_head.weight", "lm_heads.0.weight") if name in self._names]
            names = shared[:1]
        elif "lm_head.weight" in self._names and not list(self._matches(_OUTPUT)):
            names = ["lm_head.weight"]
        else:
            names = [f"lm_heads.{head}.weight" for head in range(num_heads)]
        num_rows = self._vocab_size if token_map is None else len(token_map)
        outputs = []
        for name in names:
            shape = self._shape(name)
            if len(shape) != 2 or shape[0] not in (num_rows, self._vocab_size):
                raise self._error(
                    f"{name} has shape {list(shape)}, but the model has a vocabulary of {self._vocab_size} tokens, of "
                    f"which the heads guess {num_rows}: they belong to another model"
                )
            matrix = self._floats(name, (shape[0], self._hidden_size))
            outputs.append(matrix if token_map is None or shape[0] == num_rows else matrix[token_map])
        return outputs

    def _token_map(self) -> Tensor | None:
        wanted = self._config.num_rows
        if "token_map" not in self._names:
            if wanted is not None and wanted != self._vocab_size:
                raise self._error(
                    f"config.json says truncated_vocab_size {wanted}, and the model has {self._vocab_size} tokens, but "
                    "there is no token_map that says which they are"
                )
            return None
        shape = self._shape("token_map")
        if len(shape) != 1 or not 1 <= shape[0] <= self._vocab_size or (wanted is not None and shape[0] != wanted):
            raise self._error(
                f"token_map has shape {list(shape)}, but must name {wanted or 'some'} of {self._vocab_size} tokens"
            )
        tokens = self._tensors.read(self._names["token_map"])
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise self._error(f"token_map holds {tokens.dtype} where token ids should be")
        tokens = tokens.long()
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise self._error(
                f"token_map names tokens {lowest} to {highest}, but the model's vocabulary has {self._vocab_size}: the "
                "heads belong to another model"
            )
        if len(torch.unique(tokens)) != len(tokens):
            raise self._error("token_map names a token twice")
        return tokens

    def _markov(self, num_rows: int) -> tuple[Tensor, Tensor] | None:
        names = ("markov_w1.weight", "markov_w2.weight")
        if not any(name in self._names for name in names):
            return None
        first, second = (self._shape(name) for name in names)
        if len(first) != 2 or first[0] not in (num_rows, self._vocab_size) or second != (num_rows, first[1]):
            raise self._error(
                f"the Markov term's matrices have shapes {list(first)} and {list(second)}, but must be "
                f"[{num_rows}, rank] both"
            )
        return self._floats(names[0], first), self._floats(names[1], second)

    def _newest(self, num_heads: int, markov: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        found = {int(match[1]) for match in self._matches(_NEWEST)}
        if not found:
            return []
        if markov is None or found != set(range(num_heads)):
            raise self._error("some blocks have a newest.weight, but not all, or there is no markov_w1.weight beside")
        shape = (self._hidden_size, markov[0].shape[1])
        return [self._floats(f"blocks.{head}.newest.weight", shape) for head in range(num_heads)]

    def _layer(self, weight: str, bias: str | None) -> Layer:
        size = self._hidden_size
        shape = self._shape(weight)
        if len(shape) == 2 and shape[0] == shape[1] != size:
            raise self._error(
                f"the heads read hidden states of {shape[0]} features, but the model's have {size}: they belong to "
                "another model"
            )
        return self._floats(weight, (size, size)), None if bias is None else self._floats(bias, (size,))

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._shape(name)
        if found != shape:
            raise self._error(f"{name} has shape {list(found)}, but the model asks for {list(shape)}")
        tensor = self._tensors.read(self._names[name])
        if not tensor.is_floating_point():
            raise self._error(f"{name} holds {tensor.dtype}, and only floating-point weights can be read")
        if not bool(torch.isfinite(tensor).all()):
            raise self._error(f"{name} holds NaN or infinity")
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._names:
            raise self._error(f"{name} is missing")
        return self._tensors.shape(self._names[name])

    def _matches(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        return (match for match in map(pattern.fullmatch, self._names) if match)

    def _check_numbers(self, heads: Mapping[int, object], what: str) -> None:
        if not heads:
            raise self._error("no Medusa heads are in it: neither 0.0.linear.weight nor blocks.0.layers.0.weight")
        if sorted(heads) != list(range(len(heads))) or len(heads) > _MAX_HEADS:
            raise self._error(f"it has {what} of the heads {sorted(heads)[:20]}, but they must be 0, 1, ...")

    def _check_unknown(self, known: set[str]) -> None:
        """What is not understood is refused: heads without a part of them would only guess badly."""
        unknown = sorted(self._names.keys() - known)
        if unknown:
            raise self._error(f"{len(unknown)} tensors are no part of Medusa heads: {', '.join(unknown[:5])}")

    def _error(self, reason: str) -> ValueError:
        return drafter_error(self._path, reason)


def _own_names(names: list[str], path: Path) -> dict[str, str]:
    """The heads' tensors by their own names. Beside a prefix lie the weights of the model that the heads belong to."""
    for prefix in _PREFIXES:
        prefixed = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if prefixed:
            known = {name: name for name in names if _BLOCK.fullmatch(name) or _OUTPUT.fullmatch(name)}
            single = {name: name for name in _SINGLE if name in names}
            return {**known, **single, **prefixed} if not _is_reference(prefixed) else prefixed
    return {name: name for name in names}


def _is_reference(names: Mapping[str, str]) -> bool:
    return any(map(_REFERENCE.fullmatch, names))
