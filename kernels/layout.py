"""The width of a panel, apart from what is compiled for it: a plan asks for it before anything is."""

from __future__ import annotations

PANEL = 16  # columns of a packed matrix, or keys of a block, that compiled products compute at once
