"""What compiled CPU layers can hold. A module of its own: models and the plan read it without compiling kernels."""

from __future__ import annotations

PANEL = 16  # output columns of a packed matrix, or keys of a KV block, that a register tile computes at once
MAX_ROTATIONS = 4  # of a model
