"""What a user can get wrong about a model."""

from __future__ import annotations


class ModelError(ValueError):
    """The model cannot be had, read or run; the text names the file, the reason and what to do."""

    kind = "model"
