"""How a checkpoint that was made for embeddings pools its hidden states, where its files say so."""

from __future__ import annotations

from engine.loading.json_file import read_json_object
from engine.loading.source import ModelSource
from engine.models.model_error import ModelError
from engine.types import Pooling

POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers
_FLAGS = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}
_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
_GGUF_MODES: dict[int, Pooling] = {1: "mean", 3: "last"}


def read_pooling_default(source: ModelSource) -> Pooling:
    """ "last" where nothing is said. Modes that a causal model has no use for (of a first token) count as nothing.

    ModelError for a file that cannot be read.
    """
    if source.kind == "gguf":
        header = source.gguf_header
        return _GGUF_MODES.get(header.integer(f"{header.architecture}.pooling_type", 0), "last")
    file = source.path / POOLING_FILE
    if not file.is_file():
        return "last"
    content = read_json_object(file)
    modes = [mode for flag, mode in _FLAGS.items() if content.get(flag) is True]
    named = content.get("pooling_mode")
    modes += [named] if isinstance(named, str) else []
    known = {_MODES[mode] for mode in modes if mode in _MODES}
    if len(known) > 1:
        raise ModelError(f"{file} asks for several ways of pooling at once, {', '.join(sorted(modes))}; choose one")
    return known.pop() if known else "last"
