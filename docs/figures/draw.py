"""The plots of README.md and docs/performance.md, out of committed result files and nothing else.

python docs/figures/draw.py        # writes the .svg files beside it; needs matplotlib, of the extra `loadtest`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loadtest.report.session import load
from loadtest.report.speculation import Point, points_of

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "loadtest" / "results"
COMPARISON = "2026-11-21-161224-cpu.json"
SCALING = "2026-11-21-172547-scaling.json"
PROFILE = "2026-11-21-170613-step-profile.json"
SPECULATION: tuple[str, ...] = ()  # the parts of one measurement by `python -m loadtest spec`; none yet, and no plot

OURS, LLAMA, VLLM, INK, GRID = "#2a78d6", "#eb6834", "#8a8985", "#2b2b29", "#e4e3df"
PANELS = {  # title -> servers, as the comparison calls them; each beside those that read weights of the same precision
    "16-bit weights": {
        "peregrine": ("Peregrine", OURS),
        "llama-bf16": ("llama.cpp", LLAMA),
        "vllm-float32": ("vLLM (32-bit)", VLLM),
    },
    "8-bit weights": {"peregrine-int8": ("Peregrine", OURS), "llama-q8": ("llama.cpp", LLAMA)},
    "4-bit weights": {"peregrine-int4": ("Peregrine", OURS), "llama-q4": ("llama.cpp", LLAMA)},
}
AVX512 = ("2026-11-30-095645-peers-few.json", "2026-11-30-101105-peers-many.json")
AVX512_PANELS = {
    "16-bit weights": {
        "peregrine-bf16": ("Peregrine", OURS),
        "llama-bf16": ("llama.cpp", LLAMA),
        "vllm-bf16": ("vLLM", VLLM),
    },
    "8-bit weights": {"peregrine-q8": ("Peregrine", OURS), "llama-q8": ("llama.cpp", LLAMA)},
    "4-bit weights": {
        "peregrine-q4": ("Peregrine", OURS),
        "peregrine-q4-a8": ("Peregrine, 8-bit activations", "#7fb2ec"),
    },
}
PARTS = {  # of a step's profile -> color
    "weights": OURS,
    "attention": LLAMA,
    "norms and other": "#e87ba4",
    "dispatch, Python, building the batch": "#eda100",
    "sampling": "#1baf7a",
    "scheduling": "#4a3aa7",
    "update": "#7fb2ec",
    "between the processes and HTTP": "#b9b8b3",
}
METHODS = {  # of speculation -> name and color
    "ngram": ("n-grams", OURS),
    "suffix": ("suffixes", LLAMA),
    "medusa": ("Medusa heads", "#1baf7a"),
}
WORKLOADS = {  # of a measurement of speculation -> title of its panel
    "chat": "chat, greedy",
    "copy": "copying, greedy",
    "sampled": "chat, temperature 1",
}

Json = dict  # as it lies in the file; only this script reads it


def read(name: str) -> Json:
    return json.loads((RESULTS / name).read_text())


def main() -> None:
    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "svg.hashsalt": "peregrine",  # the same bytes every time
            "axes.edgecolor": "#b9b8b3",
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    comparison = read(COMPARISON)
    save(bars(comparison, PANELS, "output tokens per second", output_rate), "cpu-throughput.svg")
    save(bars(comparison, PANELS, "ms between tokens, 99th percentile", wait_p99), "cpu-itl-p99.svg")
    together = joined([read(name) for name in AVX512])
    save(bars(together, AVX512_PANELS, "output tokens per second", output_rate), "cpu-avx512-throughput.svg")
    save(scaling(read(SCALING)), "cpu-step-scaling.svg")
    save(profile(read(PROFILE)), "cpu-step-profile.svg")
    if SPECULATION:
        points = points_of([load(RESULTS / name) for name in SPECULATION])
        save(speed_ups(points), "cpu-speculation.svg")
        save(acceptance(points), "cpu-speculation-acceptance.svg")


def output_rate(figures: Json) -> float:
    return figures["output_tokens_per_second"]


def wait_p99(figures: Json) -> float:
    return figures["inter_token_latency"]["p99"] * 1e3


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None, "Creator": None}, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def joined(comparisons: Sequence[Json]) -> Json:
    """The runs of several comparisons of the same servers as those of one."""
    return {key: [one for part in comparisons for one in part[key]] for key in ("scenarios", "measurements")}


def bars(
    comparison: Json, panels: dict[str, dict[str, tuple[str, str]]], title: str, value: Callable[[Json], float]
) -> Figure:
    """A panel for each precision, a group of bars for each number of clients; medians over the rounds."""
    clients = [scenario["concurrency"] for scenario in comparison["scenarios"] if scenario["output_length"] != "1"]
    figure, axes = plt.subplots(1, len(panels), figsize=(10.5, 3.1), sharey=True, width_ratios=[4, 3, 3])
    for ax, (panel, servers) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(servers)
        for i, (server, (label, color)) in enumerate(servers.items()):
            heights = [median(runs(comparison, server, f"concurrency {count}", value)) for count in clients]
            at = [x + (i - (len(servers) - 1) / 2) * width for x in range(len(clients))]
            ax.bar_label(
                ax.bar(at, heights, width * 0.92, color=color, label=label), fmt="%.0f", fontsize=7.5, padding=1.5
            )
        ax.set_xticks(range(len(clients)), [str(count) for count in clients])
        ax.set_title(panel, fontsize=10)
        ax.legend(frameon=False, fontsize=8.5, loc="upper left")
        tidy(ax)
    axes[1].set_xlabel("clients at once")
    axes[0].set_ylabel(title)
    axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.2)  # room for the legends
    figure.tight_layout()
    return figure


def runs(comparison: Json, server: str, scenario: str, value: Callable[[Json], float]) -> list[float]:
    return [
        value(run["figures"])
        for run in comparison["measurements"]
        if (run["server"], run["scenario"]) == (server, scenario) and not run["is_disturbed"]
    ]


def scaling(result: Json) -> Figure:
    """A step's milliseconds against running sequences, context and waiting requests."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 2.9))
    line(axes[0], result["over_batch"], "num_running", OURS, "")
    for count, color in ((1, OURS), (8, LLAMA)):
        rows = [row for row in result["over_context"] if row["state"]["num_running"] == count]
        line(axes[1], rows, "context", color, f"{count} running")
    line(axes[2], result["over_waiting"], "num_waiting", OURS, "")
    axes[0].set(xlabel="running, contexts of 128", ylabel="ms per step", xscale="log", yscale="log")
    axes[1].set(xlabel="context, tokens", xscale="log", yscale="log")
    axes[2].set(xlabel="waiting, beside 64 running", ylim=(0, 180))
    axes[2].set_xscale("symlog", linthresh=50)
    axes[2].set_xlim(-10, 20000)
    axes[0].set_xticks(*ticks([1, 2, 4, 8, 16, 32, 64]))
    axes[1].set_xticks(*ticks([128, 512, 2048, 8192]))
    axes[2].set_xticks(*ticks([0, 100, 1000, 10000]))
    for ax in axes[:2]:
        ax.set_yticks(*ticks([10, 20, 50, 100]))
    for ax in axes:
        ax.minorticks_off()
        tidy(ax)
    axes[1].legend(frameon=False, fontsize=8.5)
    figure.tight_layout()
    return figure


def line(ax: Axes, rows: Sequence[Json], over: str, color: str, label: str) -> None:
    xs, ys = [row["state"][over] for row in rows], [row["times"]["whole"] * 1e3 for row in rows]
    ax.plot(xs, ys, "o-", color=color, markersize=4, label=label)
    for x, y in zip(xs, ys, strict=True):
        ax.annotate(f"{y:.0f}", (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5)


def ticks(values: Sequence[int]) -> tuple[list[int], list[str]]:
    return list(values), [f"{value:,}" for value in values]


def profile(result: Json) -> Figure:
    """Where the milliseconds between two tokens of a client go."""
    figure, axes = plt.subplots(2, 1, figsize=(10.5, 2.6))
    for ax, batch in zip(axes, result["batches"], strict=True):
        parts = {name: seconds * 1e3 for name, seconds in batch["parts"].items()}
        parts["between the processes and HTTP"] = (batch["served"] - batch["step"]) * 1e3
        left = 0.0
        for name, color in PARTS.items():
            ax.barh(0, parts[name], left=left, color=color, label=name, height=0.6)
            if parts[name] > 0.03 * batch["served"] * 1e3:
                ink = "white" if name == "weights" else INK
                ax.text(
                    left + parts[name] / 2, 0, f"{parts[name]:.1f}", ha="center", va="center", fontsize=8, color=ink
                )
            left += parts[name]
        ax.set_yticks([0], [f"batch {batch['num_seqs']}"])
        ax.set_xlim(0, left)
        for spine in ("left", "right", "top"):
            ax.spines[spine].set_visible(False)
    axes[1].set_xlabel("ms")
    axes[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    figure.tight_layout()
    return figure


def speed_ups(points: Sequence[Point]) -> Figure:
    """Each method's tokens per second over those of the server without, against concurrency; 90% intervals shaded."""

    def draw(ax: Axes, here: list[Point], label: str, color: str) -> None:
        measured = [point for point in here if point.ratio is not None]
        xs, ys = [point.concurrency for point in measured], [point.ratio for point in measured]
        lows, highs = ([(p.interval or (p.ratio, p.ratio))[end] for p in measured] for end in (0, 1))
        ax.plot(xs, ys, "o-", color=color, markersize=4, label=label)
        ax.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(*ticks([point.concurrency for point in here]))
        ax.axhline(1, color=VLLM, linewidth=0.8)

    return by_workload(points, draw, "clients at once", "tokens/s, times those without")


def acceptance(points: Sequence[Point]) -> Figure:
    """The share of drafts whose first, second, ... token was accepted, with the fewest clients."""

    def draw(ax: Axes, here: list[Point], label: str, color: str) -> None:
        shares = here[0].by_position
        ax.plot(range(1, len(shares) + 1), shares, "o-", color=color, markersize=4, label=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(0, 1)

    return by_workload(points, draw, "position in the draft", "accepted")


def by_workload(
    points: Sequence[Point], draw: Callable[[Axes, list[Point], str, str], None], below: str, beside: str
) -> Figure:
    """A panel for each workload, in which every method but the reference is drawn: its points by concurrency."""
    workloads = list(dict.fromkeys(point.workload for point in points))
    figure, axes = plt.subplots(1, len(workloads), figsize=(10.5, 3.1), sharey=True, squeeze=False)
    for ax, workload in zip(axes[0], workloads, strict=True):
        for server in dict.fromkeys(point.server for point in points if point.server != points[0].server):
            here = [point for point in points if (point.workload, point.server) == (workload, server)]
            if here:
                draw(ax, sorted(here, key=lambda point: point.concurrency), *METHODS.get(server, (server, VLLM)))
        ax.set_title(WORKLOADS.get(workload, workload), fontsize=10)
        tidy(ax)
    axes[0][len(workloads) // 2].set_xlabel(below)
    axes[0][0].set_ylabel(beside)
    axes[0][0].legend(frameon=False, fontsize=8.5)
    figure.tight_layout()
    return figure


def tidy(ax: Axes) -> None:
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


if __name__ == "__main__":
    main()
