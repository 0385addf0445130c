"""Heads that come with Peregrine: for the default model, made by `peregrine train-heads` (see their README.md)."""

from __future__ import annotations

from pathlib import Path

from engine.config import DEFAULT_MODEL

_FOLDER = Path(__file__).parent / "heads"


def shipped_heads(model_path: str) -> Path | None:
    """The heads for the model that `model.path` names; None for every other model than the default one."""
    return _FOLDER / DEFAULT_MODEL if model_path == DEFAULT_MODEL else None
