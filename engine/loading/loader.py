"""Loads a model: finds its files, reads its config, fills its weights, and gathers what the server must know of it."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.ipc.messages import TokenizerAssets
from engine.loading.checkpoint import Checkpoint, open_checkpoint, read_generation_config
from engine.loading.default_model import Report
from engine.loading.dummy import byte_tokenizer, fill_with_random_weights
from engine.loading.generation_defaults import find_eos_token_ids, read_generation_defaults
from engine.loading.gguf.tensors import gguf_exact_bytes, gguf_stored_weights, gguf_weights
from engine.loading.loading_peak import Matrix
from engine.loading.model_facts import ModelFacts, StoredKind
from engine.loading.notes import checkpoint_notes
from engine.loading.pooling_default import read_pooling_default
from engine.loading.source import ModelSource, digest_weights, find_source, safetensors_weights
from engine.loading.stored_weights import check_shapes
from engine.loading.text_part import name_in_text_part, text_weights
from engine.loading.tokenizer_assets import check_token_ids, load_tokenizer_assets
from engine.memory_errors import is_out_of_memory
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.context_length import length_where_rope_changes, read_longest_context, read_trained_context
from engine.models.model import Model
from engine.models.model_error import FOREIGN_ERRORS, ModelError
from engine.models.moe import name_of_stack
from engine.models.registry import build_model
from engine.quantization.linear import KeptMatrix, Linear, LinearMethods
from engine.quantization.stored_levels import StoredLevels, as_floats
from engine.types import Pooling
from kernels.numba.core.formats import FLOAT8, FP4, NF4, SIZES

T = TypeVar("T")
_FLOAT8_CODES = 1.01  # bytes a weight, with a scale of each row or block
_SCALES_OF_CODES = 4 / 32  # that they may take beside a compiled format's, of 32 weights
_NUMBER = re.compile(r"\.\d+(?=\.)")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what goes to the server with it."""

    model: Model
    path: str
    architecture: str
    num_parameters: int
    weight_bytes: int  # in the dtype of the model, before any is packed
    vocab_size: int
    trained_context: int  # tokens
    eos_token_ids: list[int]
    generation_defaults: dict[str, float]
    pooling: Pooling  # of embeddings, by default
    tokenizer: TokenizerAssets
    weights_digest: str


def silent(phase: str, detail: str) -> None:
    """A report to nobody."""


def read_model_facts(config: ModelConfig, *, report: Report = silent) -> ModelFacts:
    """Reads configs and headers only: of a model on the hub, no weights are downloaded. ModelError as `load_model`."""
    source = find_source(config.model_copy(update={"load_format": "dummy"}), report)
    checkpoint = open_checkpoint(source, config)
    with torch.device("meta"):
        model = _build(checkpoint, config, torch.float32)
    _check_shapes(checkpoint, model)
    trained_context, longest_context = _contexts(checkpoint, config)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Linear)]
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    inner = [module for module in linears if id(module.weight) not in embeddings]
    exact_bytes = _exact_bytes(checkpoint, config)
    widths = [model.experts.widest, *(m.out_features for m in inner if m.out_features != model.vocab_size)]
    return ModelFacts(
        path=config.path,
        architecture=checkpoint.architecture,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_linear_parameters=sum(module.in_features * module.out_features for module in inner),
        num_embedding_parameters=sum(weight.numel() for weight in embeddings.values()),
        embedding_bytes=exact_bytes.get("model.embed_tokens.weight"),
        is_bfloat16=config.load_format != "dummy" and _is_bfloat16(checkpoint, model),
        ties_output=len(inner) < len(linears),
        attention_layers=tuple(model.attention_layers),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        experts=model.experts,
        why_not_compiled=model.why_not_compiled,
        widest=max(widths) or model.hidden_size,
        trained_context=trained_context,
        longest_context=longest_context,
        rope_changes_at=length_where_rope_changes(checkpoint.config),
        notes=checkpoint_notes(checkpoint),
        stored=_stored_kinds(checkpoint),
        loads_whole=model.loads_whole,
        matrices=_matrices(model, set(embeddings), exact_bytes, _code_bytes(checkpoint)),
    )


def _stored_kinds(checkpoint: Checkpoint) -> tuple[StoredKind, ...]:
    headers = _as_named_in_model(checkpoint, checkpoint.quantized.matrices)
    names = {name: _NUMBER.sub("", name).removesuffix(".weight").removeprefix("model.") for name in headers}
    kinds = Counter((names[name], one.label, one.kind, one.why_float) for name, one in headers.items())
    return tuple(StoredKind(*kind, count) for kind, count in kinds.items())


def _exact_bytes(checkpoint: Checkpoint, config: ModelConfig) -> Mapping[str, float]:
    """Bytes per weight in which compiled layers keep a tensor of the checkpoint exactly, if they can, by its name."""
    if config.load_format == "dummy":
        return {}
    if checkpoint.source.kind == "gguf":
        return gguf_exact_bytes(checkpoint.source.gguf_header)
    sizes = {name: 2.0 for name, tensor in checkpoint.stored.items() if tensor.dtype in ("F16", "BF16")}
    kinds = {name: matrix.kind for name, matrix in checkpoint.quantized.matrices.items()}
    sizes |= {name: SIZES[kind] for name, kind in kinds.items() if kind is not None}
    return _as_named_in_model(checkpoint, sizes)


def _code_bytes(checkpoint: Checkpoint) -> Mapping[str, float]:
    """Bytes per weight in which a GPU keeps a matrix as it is stored, at most, by its name; of code books, none."""
    kinds = {name: matrix.kind for name, matrix in checkpoint.quantized.matrices.items()}
    sizes = {
        name: _FLOAT8_CODES if kind == FLOAT8 else SIZES[kind] + _SCALES_OF_CODES
        for name, kind in kinds.items()
        if kind is not None and kind not in (NF4, FP4)
    }
    return _as_named_in_model(checkpoint, sizes)


def _matrices(
    model: Model, shared: set[int], exact_bytes: Mapping[str, float], code_bytes: Mapping[str, float]
) -> tuple[Matrix, ...]:
    """shared: the ids of weights that are embeddings too"""
    shapes, found = model.stored_shapes(), []
    exact_bytes = {model.own_name(name): size for name, size in exact_bytes.items()}
    code_bytes = {model.own_name(name): size for name, size in code_bytes.items()}
    for path, layer in model.named_modules():
        if type(layer) not in (nn.Linear, Linear, KeptMatrix):
            continue
        assert isinstance(layer, nn.Linear | KeptMatrix)
        names = [name for name in model.stored_names(path) if name.endswith(".weight")]
        sizes = {name: exact_bytes.get(name, exact_bytes.get(name_of_stack(name))) for name in names}
        known = {name: size for name, size in sizes.items() if size is not None}
        in_file = sum(math.prod(shapes[name]) * size for name, size in known.items())
        num_weights = layer.in_features * layer.out_features
        found.append(
            Matrix(
                num_weights,
                is_output=path.rpartition(".")[2] == "lm_head",
                is_shared=id(layer.weight) in shared,
                exact_bytes=in_file / num_weights if known and len(known) == len(names) else None,
                is_of_experts=type(layer) is KeptMatrix,
                code_bytes=max(code_bytes[name] for name in names) if names and code_bytes.keys() >= {*names} else None,
            )
        )
    return tuple(found)


def load_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    methods: LinearMethods | None = None,
    report: Report = silent,
) -> LoadedModel:
    """Builds and fills the model on torch's default device. `report(phase, detail)` hears of each phase as it starts.

    methods: how matrices are kept, each of which is packed as soon as its last part is read (None: as plain floats).
    `seed` is that of dummy weights. ModelError for whatever is wrong with the model's files, names or family.
    """
    report("config", config.path)
    source = find_source(config, report)
    checkpoint = open_checkpoint(source, config)
    model = _build(checkpoint, config, dtype, methods)
    sizes = [(parameter.numel(), parameter.nbytes) for parameter in model.parameters()]
    if config.load_format == "dummy":
        report("weights", "random")
        with _finishing(methods):
            fill_with_random_weights(model, seed)
        digest = hashlib.sha256(f"dummy {seed} {checkpoint.config.to_json_string()}".encode()).hexdigest()[:32]
    else:
        report("weights", f"{source.num_bytes / 1e6:,.0f} MB as {str(dtype).removeprefix('torch.')}")
        with _finishing(methods):
            _fill(model, checkpoint)
        digest = digest_weights(source)
    report("tokenizer", config.tokenizer or config.path)
    tokenizer = _load_tokenizer(checkpoint, config, model.vocab_size)
    generation = read_generation_config(source)
    eos_token_ids = find_eos_token_ids(checkpoint.config, generation, tokenizer)
    return LoadedModel(
        model=model,
        path=config.path,
        architecture=checkpoint.architecture,
        num_parameters=sum(count for count, _ in sizes),
        weight_bytes=sum(num_bytes for _, num_bytes in sizes),
        vocab_size=model.vocab_size,
        trained_context=_contexts(checkpoint, config)[0],
        eos_token_ids=[token_id for token_id in eos_token_ids if 0 <= token_id < model.vocab_size],
        generation_defaults=read_generation_defaults(generation, f"{source.path}/generation_config.json"),
        pooling=read_pooling_default(source),
        tokenizer=tokenizer,
        weights_digest=digest,
    )


def open_weights(config: ModelConfig) -> tuple[CheckpointConfig, Iterator[tuple[str, Tensor]]]:
    """The config of a model's layers, and its weights one at a time by their Hugging Face names, in the files' dtype;
    those that a GGUF file has quantised in float32.

    ModelError as `load_model`, and for random weights, which are in no file, and for those of quantised checkpoints.
    """
    if config.load_format == "dummy":
        raise ModelError(f"model.load_format is dummy, but weights of {config.path} are wanted; leave it out")
    source = find_source(config, silent)
    checkpoint = open_checkpoint(source, config)
    if checkpoint.quantized:
        raise ModelError(f"{config.path} is quantised, and its weights are wanted as floats; name the original")
    weights: Iterator[tuple[str, Tensor | StoredLevels]] = _weights(source, torch.get_num_threads())
    if checkpoint.is_part:
        weights = text_weights(weights, hidden_size=checkpoint.config.hidden_size)
    return checkpoint.config, ((name, as_floats(weight)) for name, weight in weights)


def read_tokenizer(config: ModelConfig, *, report: Report = silent) -> TokenizerAssets:
    """The model's tokenizer alone: of a model on the hub, no weights are downloaded. ModelError as `load_model`."""
    source = find_source(config.model_copy(update={"load_format": "dummy"}), report)
    checkpoint = open_checkpoint(source, config)
    return _load_tokenizer(checkpoint, config, checkpoint.config.vocab_size)


@contextmanager
def _finishing(methods: LinearMethods | None) -> Iterator[None]:
    """Nothing that only packing needed stays, whether it fails or not."""
    try:
        yield
    finally:
        if methods is not None:
            methods.method.finish()


def _build(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, methods: LinearMethods | None = None
) -> Model:
    max_model_len = config.max_model_len if isinstance(config.max_model_len, int) else None
    try:
        return build_model(
            checkpoint.config,
            dtype=dtype,
            implementation=config.implementation,
            max_model_len=max_model_len,
            methods=methods,
        )
    except torch.AcceleratorError:
        raise
    except ValueError as error:
        raise ModelError(f"{checkpoint.source.path}: {error}") from error
    except FOREIGN_ERRORS as error:  # sizes that no layer can have, in a field that nobody checks
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{checkpoint.source.path}: no model can be built from its config.json: {reason}") from error


def _check_shapes(checkpoint: Checkpoint, model: Model) -> None:
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored.items()}
    shapes |= {name: matrix.shape for name, matrix in checkpoint.quantized.matrices.items()}
    try:
        check_shapes(_as_named_in_model(checkpoint, shapes), model.stored_shapes())
    except ValueError as error:
        raise ModelError(f"{checkpoint.source.path}: {error}") from error


def _as_named_in_model(checkpoint: Checkpoint, found: Mapping[str, T]) -> Mapping[str, T]:
    """What was found of the files' tensors, by the names that the model knows."""
    if not checkpoint.is_part:
        return found
    named = ((name_in_text_part(name), one) for name, one in found.items())
    return {name: one for name, one in named if name is not None}


def _is_bfloat16(checkpoint: Checkpoint, model: Model) -> bool:
    """Whether all that the model reads is bfloat16, vectors too. (Those of a GGUF file are float32.)"""
    if checkpoint.quantized:
        return False
    stored = _as_named_in_model(checkpoint, checkpoint.stored)
    found = {stored[name].dtype for name in model.stored_shapes() if name in stored}
    return found == {"BF16"}


def _fill(model: Model, checkpoint: Checkpoint) -> None:
    num_threads, source = torch.get_num_threads(), checkpoint.source
    try:
        if source.kind == "gguf" and model.keeps_levels:
            with closing(gguf_stored_weights(source.gguf_header)) as levels:
                model.load_weights(levels)
            return
        with closing(_weights(source, num_threads)) as stored:
            weights: Iterable[tuple[str, Tensor | StoredLevels]] = stored
            if checkpoint.quantized:
                known = None if checkpoint.is_part else model.stored_shapes()
                weights = checkpoint.quantized.restore(stored, known=known)
            if checkpoint.is_part:
                weights = text_weights(weights, hidden_size=model.hidden_size)
            model.load_weights(weights)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{source.path}: {error}") from error


def _weights(source: ModelSource, num_threads: int) -> Generator[tuple[str, Tensor], None, None]:
    if source.kind == "gguf":
        return gguf_weights(source.gguf_header, num_threads=num_threads)
    return safetensors_weights(source)


def _load_tokenizer(checkpoint: Checkpoint, config: ModelConfig, vocab_size: int) -> TokenizerAssets:
    """Random weights speak any language: where a directory for them has no tokenizer, bytes are its tokens."""
    source = checkpoint.source
    is_dummy = config.load_format == "dummy" and config.tokenizer is None and source.kind == "directory"
    if is_dummy and not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        return byte_tokenizer(vocab_size)
    assets = load_tokenizer_assets(source, config, checkpoint.whole_config)
    check_token_ids(assets, vocab_size, config.tokenizer or str(source.path))
    return assets


def _contexts(checkpoint: Checkpoint, config: ModelConfig) -> tuple[int, int]:
    """(the trained context, the longest that may be asked for), in tokens."""
    try:
        return read_trained_context(checkpoint.config), read_longest_context(checkpoint.config)
    except ValueError as error:
        if isinstance(config.max_model_len, int):
            return config.max_model_len, config.max_model_len
        raise ModelError(f"{checkpoint.source.path}: {error}") from error
