"""The checkpoint that is to be quantised: its tensors by their names in its files, and which are matrices of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.compression.weight_scheme import WIDTHS, TensorShape
from engine.config import ModelConfig
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.default_model import Report
from engine.loading.gguf.tensors import gguf_shapes, gguf_weights
from engine.loading.json_file import read_json_object
from engine.loading.loader import silent
from engine.loading.source import find_source
from engine.loading.stored_weights import is_output
from engine.loading.text_part import name_in_text_part
from engine.models.checkpoint_config import BareConfig
from engine.models.model_error import ModelError
from engine.models.registry import build_model
from engine.quantization.linear import KeptMatrix

_EMBEDDING = re.compile(r"(embed|wte|wpe|embed_in|word_embeddings|tok_embeddings|position_embeddings)\w*\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+$")  # whose experts are one product too
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_IN_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..+)")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # one product, where they are run
_SCALES = {"F16": "F16"}  # of matrices in that dtype; all others have bfloat16


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """A matrix that may be quantised. name: of its tensor in the files

    unit: what it shares a format with, because servers multiply them in one go: the layer, and the first of them
    """

    name: str
    shape: tuple[int, int]
    scales: str

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def unit(self) -> str:
        parent, _, last = self.module.rpartition(".")
        first = next((group[0] for group in _FUSED if last in group), last)
        return f"{_EXPERT_NUMBER.sub('.experts', parent)}.{first}"


@dataclass(frozen=True, slots=True)
class PlainCheckpoint:
    """tensors: of all files, in order; matrices: those of layers, by name."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorShape]
    matrices: Mapping[str, PlainMatrix]

    @property
    def path(self) -> Path:
        return self.checkpoint.source.path

    @property
    def is_gguf(self) -> bool:
        return self.checkpoint.source.kind == "gguf"

    @property
    def ignored_modules(self) -> list[str]:
        """Layers with a matrix that stays as it is: the output layer, routers, other parts of a multimodal model."""
        names = [
            name.removesuffix(".weight")
            for name, (_, shape) in self.tensors.items()
            if name.endswith(".weight")
            and len(shape) == 2
            and name not in self.matrices
            and not is_output(name)
            and not _EMBEDDING.search(name)
        ]
        return ["lm_head", *sorted(names)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """One at a time, as the files have them; of a GGUF file, floats."""
        if self.is_gguf:
            yield from gguf_weights(self.checkpoint.source.gguf_header, num_threads=torch.get_num_threads())
            return
        with ExitStack() as stack:
            opened = {}
            for name, stored in self.checkpoint.stored.items():
                if stored.file not in opened:
                    stack.close()
                    opened = {stored.file: stack.enter_context(safe_open(stored.file, framework="pt"))}
                yield name, opened[stored.file].get_tensor(name)


def open_plain_checkpoint(config: ModelConfig, report: Report = silent) -> PlainCheckpoint:
    """Reads configs and headers only. ModelError for what cannot be quantised, with the reason."""
    if config.load_format == "dummy":
        raise ModelError(f"model.load_format is dummy, but weights of {config.path} are wanted; leave it out")
    source = find_source(config, report)
    checkpoint = open_checkpoint(source, config)
    if checkpoint.quantized:
        raise ModelError(f"{config.path} is quantised already, and rounding twice adds up; name the original")
    tensors: dict[str, TensorShape]
    if source.kind == "gguf":
        tensors = {name: ("BF16", shape) for name, shape in gguf_shapes(source.gguf_header).items()}
    else:
        tensors = {name: (stored.dtype, stored.shape) for name, stored in checkpoint.stored.items()}
    for name, (dtype, _) in tensors.items():
        if dtype not in WIDTHS:
            raise ModelError(f"{config.path}: {name} is {dtype}, which cannot be copied; convert it to bfloat16")
    matrices = _find_matrices(checkpoint, config, tensors)
    if not matrices:
        raise ModelError(f"{config.path} has no linear layers that are known here, so there is nothing to quantise")
    return PlainCheckpoint(checkpoint, tensors, matrices)


def _find_matrices(
    checkpoint: Checkpoint, config: ModelConfig, tensors: Mapping[str, TensorShape]
) -> dict[str, PlainMatrix]:
    with torch.device("meta"):
        try:
            model = build_model(checkpoint.config, dtype=torch.float32, implementation=config.implementation)
        except ValueError as error:
            raise ModelError(f"{checkpoint.source.path}: {error}") from error
    own, others = set(), set()
    for path, module in model.named_modules():
        if isinstance(module, KeptMatrix):
            own |= set(model.stored_names(path))
        if isinstance(module, nn.Linear | KeptMatrix):
            others.add(path)
    found = {}
    for name, (dtype, shape) in tensors.items():
        text_name = name_in_text_part(name) if checkpoint.is_part else name
        if text_name is None or len(shape) != 2 or 0 in shape or not name.endswith(".weight"):
            continue
        if is_output(name) or _EMBEDDING.search(name):
            continue
        if text_name in own or _EXPERT.search(name) or (not own and _is_module(text_name, others)):
            found[name] = PlainMatrix(name, (shape[0], shape[1]), _SCALES.get(dtype, "BF16"))
    return found


def _is_module(name: str, paths: set[str]) -> bool:
    """Whether a tensor is the weight of one of these modules of a layer; what stands before the layer may differ."""
    match = _IN_LAYER.search(name.removesuffix(".weight"))
    return match is not None and any(path.endswith(f".{match[1]}") for path in paths)


def layer_number(name: str) -> int | None:
    match = _LAYER.search(f".{name}")
    return int(match[1]) if match else None


def config_json(plain: PlainCheckpoint) -> dict[str, object]:
    """The fields of the config.json to come, without what says that it is quantised."""
    if not plain.is_gguf:
        return read_json_object(plain.path / "config.json")
    config = plain.checkpoint.config
    whole = config.of_family() if isinstance(config, BareConfig) else config
    fields: dict[str, object] = whole.to_dict()
    fields.pop("_name_or_path", None)
    return fields | {"architectures": list(config.architectures or []), "dtype": "bfloat16"}
