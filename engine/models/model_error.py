"""What a user can get wrong about a model."""

from __future__ import annotations


class ModelError(ValueError):
    """The model cannot be had, read or run; the text names the file, the reason and what to do."""

    kind = "model"


FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What code that we have not met raises for a config that it cannot take, or for tensors that do not fit together."""
