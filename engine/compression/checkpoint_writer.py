"""Writes a checkpoint's files: weights matrix by matrix, config, tokenizer, and whatever else lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.compression.matrix_rounding import RoundingError, round_matrix
from engine.compression.output_folder import check_room
from engine.compression.plain_checkpoint import PlainCheckpoint, config_json
from engine.compression.quantization_config import quantization_config
from engine.compression.tensor_file import TensorFile
from engine.compression.weight_scheme import WIDTHS, TensorShape, WeightScheme
from engine.ipc.messages import TokenizerAssets
from engine.loading.tokenizer_assets import save_tokenizer
from engine.models.model_error import ModelError

MAX_FILE_BYTES = 5_000_000_000  # as transformers cuts checkpoints
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
_WRITTEN = {"config.json", "model.safetensors.index.json"}  # anew
_INDEX = "model.safetensors.index.json"


@dataclass(slots=True)
class Written:
    """What came of a checkpoint. Bytes of weight files; num_weights: in all; schemes: of each quantised layer

    bits: of a quantised weight, scales included; None where there is none
    """

    bytes_before: int
    bytes_after: int
    num_weights: int
    num_quantized: int
    schemes: Mapping[str, WeightScheme]
    bits: float | None = None
    error: RoundingError = field(default_factory=RoundingError)


class CheckpointWriter:
    """Rounds the matrices of a checkpoint as `schemes` say, and leaves all other tensors as they are.

    schemes: by the names of tensors; those of matrices that are not in it stay floats too
    """

    def __init__(
        self, plain: PlainCheckpoint, schemes: Mapping[str, WeightScheme], *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self._plain, self._schemes = plain, schemes
        self._outputs = {name: self._tensors_of(name) for name in plain.tensors}
        self._shards = list(_cut(self._outputs, max_file_bytes))
        self.num_bytes = sum(_bytes_of(shapes.values()) for shapes in self._outputs.values())

    @property
    def config(self) -> dict[str, object]:
        """Of the layers that are quantised, as it stands in config.json."""
        modules = {name.removesuffix(".weight"): scheme for name, scheme in self._schemes.items()}
        return quantization_config(modules, self._plain.ignored_modules)

    def write(self, folder: Path, tokenizer: TokenizerAssets | None) -> Written:
        """Writes everything. tokenizer: what a GGUF file has in its header.

        ModelError for a matrix that cannot be rounded, or a disk that is full.
        """
        check_room(folder, self.num_bytes)
        try:
            error = self._write_weights(folder)
            self.write_config(folder)
            write_companions(self._plain, folder, tokenizer)
        except OSError as failure:
            reason = failure.strerror or failure
            raise ModelError(f"{folder} cannot be written: {reason}; make room, or name another folder") from failure
        written = self.summary()
        written.error = error
        return written

    def summary(self) -> Written:
        """What it will be, as far as headers say it."""
        counts = {name: prod(shape) for name, (_, shape) in self._plain.tensors.items()}
        num_quantized = sum(counts[name] for name in self._schemes)
        num_bytes = sum(_bytes_of(self._outputs[name].values()) for name in self._schemes)
        return Written(
            bytes_before=self._plain.checkpoint.source.num_bytes,
            bytes_after=self.num_bytes,
            num_weights=sum(counts.values()),
            num_quantized=num_quantized,
            schemes={name.removesuffix(".weight"): scheme for name, scheme in self._schemes.items()},
            bits=8 * num_bytes / num_quantized if num_quantized else None,
        )

    def write_config(self, folder: Path, *, quantization: dict[str, object] | None = None) -> None:
        """quantization: what the config says of it; None: as this writer has it"""
        fields = config_json(self._plain)
        fields.pop("quantization_config", None)
        if self._schemes:
            fields["quantization_config"] = self.config if quantization is None else quantization
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def _tensors_of(self, name: str) -> dict[str, TensorShape]:
        """What is written for a tensor of the checkpoint."""
        scheme = self._schemes.get(name)
        if scheme is None:
            return {name: self._plain.tensors[name]}
        matrix = self._plain.matrices[name]
        return {f"{matrix.module}.{key}": one for key, one in scheme.tensors(matrix.shape, matrix.scales).items()}

    def _write_weights(self, folder: Path) -> RoundingError:
        """As they come from the files, each into the file that it belongs to."""
        names = _file_names(len(self._shards))
        place = {source: index for index, shard in enumerate(self._shards) for source in shard}
        error = RoundingError()
        total = sum(prod(shape) for _, shape in self._plain.tensors.values())
        with ExitStack() as stack, tqdm(total=total, desc="weights", unit="", unit_scale=True, disable=None) as bar:
            files = []
            for file, shard in zip(names, self._shards, strict=True):
                shapes = {key: one for source in shard for key, one in self._outputs[source].items()}
                files.append(stack.enter_context(TensorFile(folder / file, shapes)))
            for name, weight in self._plain.weights():
                for key, tensor in self._rounded(name, weight, error):
                    files[place[name]].write(key, tensor)
                bar.update(weight.numel())
        if len(names) > 1:
            keys = {key: names[place[source]] for source, shapes in self._outputs.items() for key in shapes}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(keys.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return error

    def _rounded(self, name: str, weight: Tensor, error: RoundingError) -> Iterator[tuple[str, Tensor]]:
        scheme = self._schemes.get(name)
        if scheme is None:
            yield name, weight.to(torch.bfloat16) if self._plain.is_gguf else weight
            return
        matrix = self._plain.matrices[name]
        try:
            found = round_matrix(weight, scheme, scales=matrix.scales, error=error)
        except ValueError as failure:
            raise ModelError(f"{matrix.module} cannot be rounded: {failure}; download the model again") from failure
        for key, tensor in found.items():
            yield f"{matrix.module}.{key}", tensor


def write_companions(plain: PlainCheckpoint, folder: Path, tokenizer: TokenizerAssets | None) -> None:
    """Copies what lies beside the weights: tokenizer, chat template, generation config, licence; no folders."""
    if plain.is_gguf:
        assert tokenizer is not None, "a GGUF file has its tokenizer in its header"
        save_tokenizer(tokenizer, folder)
        return
    for file in sorted(plain.path.iterdir()):
        is_index = file.name.endswith(".index.json")
        if not file.is_file() or file.suffix in _WEIGHT_SUFFIXES or is_index or file.name in _WRITTEN:
            continue
        if not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)  # through links, as the hub's cache has them


def _cut(outputs: Mapping[str, Mapping[str, TensorShape]], max_bytes: int) -> Iterator[list[str]]:
    """The tensors of the checkpoint whose results each file has, in order."""
    shard: list[str] = []
    filled = 0
    for name, shapes in outputs.items():
        size = _bytes_of(shapes.values())
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _bytes_of(shapes: Iterable[TensorShape]) -> int:
    return sum(WIDTHS[dtype] * prod(shape) for dtype, shape in shapes)
