"""The panel width of compiled CPU layers: a module of its own, since planning needs it without compiling any kernel."""

from __future__ import annotations

PANEL = 16  # output columns of a packed matrix, or keys of a KV block, that a register tile computes at once
