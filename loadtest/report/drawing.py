"""Matplotlib's pictures as SVG inside a page: the same bytes for the same figures, and nothing to load."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRID = "#e4e3df"


def draw(size: tuple[float, float], shape: tuple[int, int], paint: Callable[[list[Axes]], object]) -> str:
    """The SVG of a figure. size: inches; shape: rows and columns of panels, which `paint` gets in reading order"""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peregrine", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        panels: list[Axes] = figure.subplots(*shape, squeeze=False).ravel().tolist()
        paint(panels)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
