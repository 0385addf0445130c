"""Where a model's files are: the default model, a directory, a hub id, or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import DEFAULT_MODEL, ModelConfig
from engine.loading.default_model import Report, ensure_model
from engine.loading.gguf.header import GGUFHeader
from engine.loading.gguf.split_files import gguf_parts, read_gguf_parts
from engine.loading.json_file import read_json_object
from engine.models.model_error import ModelError

_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_NOT_FROM_HUB = ["[!1]*/*", "consolidated*"]  # other formats of the same weights; 1_Pooling is a part of some models
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 32  # of each weight file, for the digest


@dataclass(frozen=True)
class ModelSource:
    """Files on this machine. `weight_files` is empty where weights are random or were not asked for."""

    kind: Literal["directory", "gguf"]
    path: Path
    weight_files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files)

    @cached_property
    def gguf_header(self) -> GGUFHeader:
        """Of a GGUF file, parsed once: with the vocabulary, it takes a tenth of a second. ModelError if damaged."""
        return read_gguf_parts(gguf_parts(self.path))


def find_source(config: ModelConfig, report: Report) -> ModelSource:
    """Finds the files, downloading them where `config.path` is the default model's name or a hub id.

    ModelError, with what to do, where there are none that can be read.
    """
    path = Path(config.path).expanduser()
    if config.path == DEFAULT_MODEL and not path.exists():
        return _gguf(ensure_model(report=report), config)
    if path.is_file():
        return _gguf(path, config)
    if path.is_dir():
        return _directory(path, config)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path) or path.suffix == ".gguf" or config.path.startswith("."):
        raise ModelError(f"there is no {config.path}; give a directory, a .gguf file, a hub id or {DEFAULT_MODEL}")
    return _directory(_from_hub(config, report), config)


def _gguf(path: Path, config: ModelConfig) -> ModelSource:
    if path.suffix in _PICKLED:
        raise ModelError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file but no .gguf; for safetensors, give the directory that it lies in")
    if config.load_format == "safetensors":
        raise ModelError(f"{path} is a GGUF file, but model.load_format is safetensors; set it to auto")
    parts = gguf_parts(path)
    return ModelSource("gguf", parts[0], () if config.load_format == "dummy" else parts)


def _directory(path: Path, config: ModelConfig) -> ModelSource:
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise ModelError(_explain_adapter(path))
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        found = f"; it has {', '.join(file.name for file in ggufs[:3])}: name the file itself" if ggufs else ""
        raise ModelError(f"{path} has no config.json, so it is no Hugging Face model{found}")
    if config.load_format == "gguf":
        raise ModelError(f"{path} is a directory, but model.load_format is gguf; name the .gguf file or set it to auto")
    return ModelSource("directory", path, () if config.load_format == "dummy" else _safetensors(path))


def _explain_adapter(path: Path) -> str:
    base = read_json_object(path / "adapter_config.json").get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{path} is an adapter (LoRA){of}, and adapters are not supported; merge it into its base model with peft's "
        "merge_and_unload, save that with save_pretrained, and serve the result"
    )


def _safetensors(path: Path) -> tuple[Path, ...]:
    index = path / _INDEX
    if index.is_file():
        files = sorted({path / name for name in _read_index(index)})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{path} is not complete: {', '.join(missing[:3])} are missing; download it again")
        return tuple(files)
    single = path / "model.safetensors"
    others = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    files = [single] if single.is_file() else others
    if files:
        return tuple(files)
    if any(file.suffix in _PICKLED for file in path.iterdir()):
        raise ModelError(
            f"{path} has its weights as pickles only, which can run code when they are read; convert them with "
            "transformers' save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{path} has a config.json but no weights; download them, or set model.load_format to dummy")


def files_that_are_there(path: Path) -> tuple[Path, ...]:
    """Those of a directory's safetensors files that are here; none of a model whose weights were not downloaded."""
    try:
        return tuple(file for file in _safetensors(path) if file.is_file())
    except ModelError:
        return ()


def _read_index(index: Path) -> list[str]:
    """The file name of each weight. Names that leave the directory are refused."""
    names = read_json_object(index).get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise ModelError(f"{index} does not map weights to files beside it; download it again")
    return files


def _from_hub(config: ModelConfig, report: Report) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    report("download", f"{config.path} from the Hugging Face hub")
    patterns = _HUB_FILES if config.load_format == "dummy" else [*_HUB_FILES, "*.safetensors"]
    try:
        return Path(snapshot_download(config.path, allow_patterns=patterns, ignore_patterns=_NOT_FROM_HUB))
    except (OSError, ValueError, HTTPError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"cannot get {config.path} from the hub: {reason}; check the name, the network and HF_TOKEN, "
            "or give the path of a directory"
        ) from error


def safetensors_weights(source: ModelSource) -> Generator[tuple[str, Tensor], None, None]:
    """(name, tensor) one at a time, in the dtype of the file: views of its pages, which nothing reads until it must."""
    for file in source.weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is cut short or damaged ({error}); download it again") from error


def digest_weights(source: ModelSource) -> str:
    """Identifies the weights without reading all of them: sizes, and samples over each file, its header among them."""
    digest = hashlib.sha256()
    for file in source.weight_files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as opened:
            for i in range(_NUM_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1), os.SEEK_SET)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
