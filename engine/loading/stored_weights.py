"""What the safetensors files of a checkpoint hold, known from their headers before anything is built or read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.model_error import ModelError

_FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them
_QUANTISED = re.compile(  # the last part of a name that only quantised weights have
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|weight_shape|absmax|SCB"
    r"|quant_map|quant_state\.\w+)$"
)
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_OUTPUTS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_LAYER = re.compile(r"^(?:(?:model|language_model|text_model|transformer|decoder|gpt_neox)\.)*(?:layers|h)\.(\d+)\.")
_MAX_HEADER_BYTES = 1 << 25  # of a file: 300,000 tensors take as much
_NUM_SAMPLED_ROWS = 16  # of two matrices that may be the same


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    file: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            part: Tensor = tensors.get_slice(self.name)[start:stop]
            return part


def read_stored_weights(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """By name. ModelError for a file that is cut short or damaged."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            _check_header_size(file)
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is cut short or damaged ({error}); download it again") from error
    return stored


def _check_header_size(file: Path) -> None:
    """The format's own limit lets a header of noise take seconds and a gigabyte."""
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(8), "little")
    if num_bytes > _MAX_HEADER_BYTES:
        raise ModelError(
            f"{file} is damaged: it announces a header of {num_bytes:,} bytes, and none has more than "
            f"{_MAX_HEADER_BYTES:,}; download it again"
        )


def check_is_not_quantised(stored: Mapping[str, StoredTensor], method: str | None = None) -> None:
    """ValueError for weights that are quantised though no config says so, or otherwise than it says: as numbers they
    would mean something else. method: by which the rest of the checkpoint is quantised
    """
    for name, tensor in stored.items():
        if _QUANTISED.search(name) or (name.endswith(".weight") and tensor.dtype not in _FLOATS):
            says = (
                "though its config.json does not say so" if method is None else f"which is no part of {method}'s layout"
            )
            raise ValueError(
                f"the checkpoint's weights are quantised ({name} is {tensor.dtype}), {says}; use the original "
                "checkpoint, with model.quantization if its weights are to be small"
            )


def is_output(name: str) -> bool:
    """Whether a tensor is the output layer's matrix."""
    return _OUTPUTS.search(name) is not None


def check_num_layers(stored: Mapping[str, StoredTensor], num_layers: int) -> None:
    """ValueError where the config has more layers than the files. (Files may have more: layers that only train.)"""
    found = [int(match[1]) for match in map(_LAYER.match, stored) if match]
    if found and num_layers > max(found) + 1:
        raise ValueError(
            f"config.json says num_hidden_layers {num_layers}, but the weights have no layers.{max(found) + 1}; it is "
            "damaged, or does not belong to them"
        )


def check_shapes(stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError for the first weight of another shape than the config asks for. Both by the names of the files.

    Which dimension comes first is left to those who load: some families keep a matrix the other way round.
    """
    for name, shape in expected.items():
        if name in stored and sorted(stored[name]) != sorted(shape):
            raise ValueError(
                f"the checkpoint's {name} has shape {list(stored[name])}, but the config asks for {list(shape)}"
            )


def has_output_of_its_own(stored: Mapping[str, StoredTensor]) -> bool | None:
    """Whether the output layer's matrix is another than the embedding's; None where the files do not hold both."""
    embeddings = [tensor for name, tensor in stored.items() if _EMBEDDINGS.search(name)]
    outputs = [tensor for name, tensor in stored.items() if _OUTPUTS.search(name)]
    if len(embeddings) != 1 or len(outputs) != 1:
        return None
    embedding, output = embeddings[0], outputs[0]
    if embedding.shape != output.shape:
        return True
    num_rows = embedding.shape[0]
    step = max(1, num_rows // _NUM_SAMPLED_ROWS)
    starts = range(0, num_rows, step)
    pieces = [*((start, start + 1) for start in starts), *((start, start + step) for start in starts)]  # the rest last
    return not all(torch.equal(embedding.rows(*piece), output.rows(*piece)) for piece in pieces)
