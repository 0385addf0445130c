"""The panel width of compiled CPU layers. A module of its own: the memory plan reads it without compiling kernels."""

from __future__ import annotations

PANEL = 16  # output columns of a packed matrix, or keys of a KV block, that a register tile computes at once
