"""A search for the highest rate within limits: its runs as a table, and as a picture."""

from __future__ import annotations

from functools import partial
from html import escape

from matplotlib.axes import Axes
from tabulate import tabulate

from loadtest.report.drawing import GRID, draw
from loadtest.report.session import Probe, Search


def search_table(search: Search) -> str:
    """A row for each run, in order, and the result."""
    return f"{_table(search, 'simple')}\n\n{verdict(search)}"


def search_html(search: Search) -> str:
    """The picture and the rows, for a page."""
    picture = search_picture(search)
    return f'<p>{escape(verdict(search))}</p>{picture}<div class="scroll">{_table(search, "html")}</div>'


def verdict(search: Search) -> str:
    """The result in a sentence."""
    limits = ", ".join(f"{name} {1000 * limit:g} ms" for name, limit in search.limits.items())
    kept = f"at which the {search.percentile}th percentiles stay within {limits}"
    if search.best is None:
        return f"no rate was found {kept}: {search.stopped_by}"
    return f"{search.best:.3g} requests/s is the highest rate {kept}, to {search.precision:.0%}; {search.stopped_by}"


def search_picture(search: Search) -> str:
    """A panel for each limit, as SVG: what each run measured at its rate."""
    height = 3.6 * -(-len(search.limits) // 2)
    return draw((11, height), (-(-len(search.limits) // 2), min(len(search.limits), 2)), partial(_paint, search))


def _table(search: Search, form: str) -> str:
    rows = [
        [f"{probe.rate:.3g}", probe.num_answers, *_values(search, probe), _verdict(probe)] for probe in search.probes
    ]
    headers = ["requests/s", "answers", *(f"{name} p{search.percentile}, ms" for name in search.limits), ""]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def _values(search: Search, probe: Probe) -> list[str]:
    return [f"{1000 * probe.values[name]:.0f}" if name in probe.values else "-" for name in search.limits]


def _verdict(probe: Probe) -> str:
    return "good" if probe.is_good else probe.reason + (" (ended early)" if probe.is_cut else "")


def _paint(search: Search, panels: list[Axes]) -> None:
    for axes, (name, limit) in zip(panels, search.limits.items(), strict=False):
        for is_good, color, label in ((True, "C2", "all limits kept"), (False, "C3", "not")):
            probes = [probe for probe in search.probes if probe.is_good == is_good and name in probe.values]
            values = [1000 * probe.values[name] for probe in probes]
            axes.plot([probe.rate for probe in probes], values, "o", color=color, markersize=5, label=label)
        axes.axhline(1000 * limit, color="black", linestyle=":", linewidth=1)
        if search.best is not None:
            axes.axvline(search.best, color="C2", linewidth=1)
        axes.set(title=f"{name}, p{search.percentile}", xlabel="requests per second", ylabel="ms")
        if any(name in probe.values for probe in search.probes):  # nothing has no place on a logarithmic axis
            axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.grid(color=GRID)
        axes.legend(frameon=False)
    for axes in panels[len(search.limits) :]:
        axes.set_visible(False)
