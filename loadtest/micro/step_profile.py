"""Where do one step's milliseconds go? `python -m loadtest.micro.step_profile [--threads 2] [--quantization int8]`

One decoding step at batch 1 and 32 in its parts: the weights, attention, other arithmetic, dispatch, sampling,
scheduling, and what the way to the client adds (the time between tokens at an HTTP client, less the step). Beside it
the floor: weights, keys and values read once, and the arithmetic, at the speeds that this machine was measured to have.
Writes DATE-step-profile.json and a page, DATE-step-profile.md, into loadtest/results; `--page FILE` prints the page of
an earlier run. Takes about a minute with the default model; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from engine.planning.ceilings import measure_ceilings
from loadtest.micro.measure import fastest, parse_numbers
from loadtest.micro.operation_times import (
    ATTENTION,
    WEIGHTS,
    OperationClock,
    OperationTime,
    TeamClock,
    TorchClock,
    by_kind,
    merged,
)
from loadtest.micro.served_token import served_token_seconds
from loadtest.micro.steady import State, SteadyEngine, StepTimes, add_engine_options, build_steady
from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import dated_path, load_result, save_result

CONTEXT = 128
NUM_READ_BYTES = 128 << 20  # more than caches hold
NUM_PROFILED = 10  # forward passes under the profiler
DISPATCH = "dispatch, Python, building the batch"
WAY_TO_CLIENT = "between the processes and HTTP"
OF_DTYPE = "products of the model's dtype"


def _team_clock(steady: SteadyEngine) -> OperationClock:
    from engine.attention.numba_backend import NumbaAttention

    attention = steady.executor.runner.attention
    assert isinstance(attention, NumbaAttention), "device.kernels is numba"
    return TeamClock(attention.team)


CLOCKS: dict[str, Callable[[SteadyEngine], OperationClock]] = {  # by device.kernels
    "torch": lambda steady: TorchClock(),
    "numba": _team_clock,
}


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at best, with the engine's threads.

    flops_per_second: of the arithmetic that the model's products are made of, `arithmetic`
    """

    bytes_per_second: float
    flops_per_second: float
    arithmetic: str = OF_DTYPE


@dataclass(frozen=True)
class Floor:
    """Seconds that one step takes at the machine's ceilings: reading the weights, reading keys and values, arithmetic.

    Arithmetic hides behind the reading, or the other way round, so that the floor is the longer of the two.
    """

    weights: float
    kv: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        return max(self.weights + self.kv, self.arithmetic)


@dataclass(frozen=True)
class BatchProfile:
    """step: seconds of `Engine.step`; served: between two tokens at a client, None if it was not measured.
    parts: seconds of the step by kind of work, together `step`; operations: of the forward pass, the longest first"""

    num_seqs: int
    context: int
    step: float
    served: float | None
    parts: dict[str, float]
    floor: Floor
    operations: list[OperationTime]


@dataclass(frozen=True)
class StepProfile:
    """What one run measured. settings: those of the engine, resolved"""

    environment: Environment
    settings: dict[str, str | int | float | bool | None]
    ceilings: Ceilings
    batches: list[BatchProfile]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.page is not None:
        print(page(load(options.page)))
        return 0
    profile = measure(options)
    path = dated_path(options.results, "step-profile", profile.environment)
    save_result(profile, path)
    path.with_suffix(".md").write_text(page(profile) + "\n")
    print(page(profile), f"\nwritten: {path} and {path.with_suffix('.md').name}", sep="\n")
    return 0


def measure(options: argparse.Namespace) -> StepProfile:
    """The server first, and alone: two engines beside each other would measure each other."""
    served = {} if options.no_server else served_token_seconds(options, options.batches, context=CONTEXT)
    states = [State(batch, CONTEXT) for batch in options.batches]
    steady = build_steady(options, states)
    kernels = str(steady.settings["device.kernels"])
    if kernels not in CLOCKS:
        raise ValueError(f"nobody times the operations of device.kernels {kernels!r} here; set {', '.join(CLOCKS)}")
    clock = CLOCKS[kernels](steady)
    times = [steady.measure(state, num_steps=options.steps) for state in states]
    operations = [profile_forward(steady, state, clock) for state in states]
    parts = [parts_of(*both) for both in zip(times, operations, strict=True)]
    ceilings = _measure_ceilings(steady, [part[WEIGHTS] for part in parts])
    batches = [
        BatchProfile(
            state.num_running,
            state.context,
            step=times[index].whole,
            served=served.get(state.num_running),
            parts=parts[index],
            floor=_floor(times[index], steady, ceilings),
            operations=operations[index],
        )
        for index, state in enumerate(states)
    ]
    return StepProfile(read_environment(), steady.settings, ceilings, batches)


def profile_forward(steady: SteadyEngine, state: State, clock: OperationClock) -> list[OperationTime]:
    """Times the operations of one decoding step's forward pass, done over and over: that writes the same again."""
    runner = steady.executor.runner
    try:
        steady.fill(state, num_steps=1)
        inputs = steady.engine.builder.build(steady.engine.scheduler.schedule())
        with torch.inference_mode():
            runner.forward(inputs)
            return merged(clock.profile(lambda: runner.forward(inputs), NUM_PROFILED))
    finally:
        steady.clear()


def parts_of(times: StepTimes, operations: list[OperationTime]) -> dict[str, float]:
    """The step's seconds by kind of work. What the forward pass takes beyond its operations' arithmetic is dispatch."""
    kinds = by_kind(operations)
    forward = times.parts["forward"]
    return {
        **kinds,
        DISPATCH: max(forward - sum(kinds.values()), 0.0),
        "sampling": times.parts["sample"],
        "scheduling": times.parts["schedule"],
        "update": times.parts["update"] + times.parts["propose"] + times.parts["other"],
    }


def _measure_ceilings(steady: SteadyEngine, weights: list[float]) -> Ceilings:
    """The fastest of several ways to read, the engine's own products among them, which took `weights` seconds each;
    the instruction that compiled products are made of, or products in the model's own dtype."""
    num_threads = int(steady.settings["device.num_threads"] or 1)
    num_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    block, vector = torch.ones(NUM_READ_BYTES // 4096 // 4, 4096), torch.ones(4096)
    bytes_per_second = max(
        measure_ceilings(num_threads)[0],
        block.nbytes / fastest(lambda _: block @ vector, num_calls=3),
        steady.engine.cost.weight_bytes / max(min(weights), 1e-9),
    )
    flops_per_second, arithmetic = _arithmetic(steady, num_threads)
    torch.set_num_threads(num_before)
    return Ceilings(bytes_per_second, flops_per_second, arithmetic)


def _arithmetic(steady: SteadyEngine, num_threads: int) -> tuple[float, str]:
    """Its ceiling, in operations per second, and what it is."""
    if steady.settings["device.kernels"] == "numba":
        from engine.models.llama_numba import NumbaLlama
        from loadtest.micro.instruction_rates import instruction_of, rate

        model = steady.executor.runner.model
        assert isinstance(model, NumbaLlama), "device.kernels is numba"
        name = instruction_of(model.product_kind)
        return rate(name, num_threads), f"instructions of {name}"
    matrix = torch.ones(768, 768, dtype=getattr(torch, str(steady.settings["model.dtype"])))
    seconds = fastest(lambda _: matrix @ matrix, num_calls=3)
    return 2 * len(matrix) ** 3 / seconds, OF_DTYPE


def _floor(times: StepTimes, steady: SteadyEngine, ceilings: Ceilings) -> Floor:
    weight_bytes = steady.engine.cost.weight_bytes
    return Floor(
        weights=weight_bytes / ceilings.bytes_per_second,
        kv=(times.bytes_moved - weight_bytes) / ceilings.bytes_per_second,
        arithmetic=times.flops / ceilings.flops_per_second,
    )


def load(path: Path) -> StepProfile:
    """Raises ValueError if the file is of something else."""
    return load_result(path, StepProfile, origin="loadtest.micro.step_profile")


def page(profile: StepProfile) -> str:
    """Markdown: for each batch the parts beside their floors, and what stands between, the largest first."""
    where, settings = profile.environment, profile.settings
    names = ("model.dtype", "model.quantization", "device.kernels", "device.num_threads")
    head = [
        "# Where a decoding step's time goes",
        f"{where.line}. {', '.join(f'{name} {settings[name]}' for name in names)}. "
        f"Contexts of about {profile.batches[0].context} tokens.",
        f"The machine reads {profile.ceilings.bytes_per_second / 1e9:.1f} GB/s and multiplies "
        f"{profile.ceilings.flops_per_second / 1e9:.0f} GOP/s with these threads ({profile.ceilings.arithmetic}; "
        "measured in the same run).",
    ]
    return "\n\n".join([*head, *(_section(batch) for batch in profile.batches)])


def _section(batch: BatchProfile) -> str:
    floors = {WEIGHTS: max(batch.floor.weights, batch.floor.arithmetic), ATTENTION: batch.floor.kv}
    parts = dict(batch.parts)
    if batch.served is not None:
        parts[WAY_TO_CLIENT] = batch.served - batch.step
    whole = batch.step if batch.served is None else batch.served
    rows = []
    for name, seconds in parts.items():
        floor = f"{1e3 * floors[name]:.2f}" if name in floors else ""
        rows.append([name, f"{1e3 * seconds:.2f}", floor, f"{100 * seconds / whole:.0f}"])
    title = "a step" if batch.served is None else "a token at the client"
    rows.append([f"**{title}**", f"**{1e3 * whole:.2f}**", f"**{1e3 * batch.floor.seconds:.2f}**", "100"])
    headers, align = ["part", "ms", "floor, ms", "share, %"], ["left", "right", "right", "right"]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n\n".join([f"## Batch {batch.num_seqs}", table, _distance(parts, floors, batch), _slowest(batch)])


def _distance(parts: dict[str, float], floors: dict[str, float], batch: BatchProfile) -> str:
    """In words: how far the step is from its floor, and what the distance is made of."""
    beyond = {name: seconds - floors.get(name, 0.0) for name, seconds in parts.items()}
    largest = sorted(beyond.items(), key=lambda item: -item[1])
    items = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in largest if seconds > 0.02 * batch.step)
    bound = "reading" if batch.floor.weights + batch.floor.kv > batch.floor.arithmetic else "arithmetic"
    return (
        f"A step of {1e3 * batch.step:.2f} ms is {batch.step / batch.floor.seconds:.1f} times its floor, which {bound} "
        f"sets. Milliseconds beyond the floor, the largest first: {items}."
    )


def _slowest(batch: BatchProfile) -> str:
    shown = ", ".join(f"`{operation.name}` {1e3 * operation.seconds:.2f}" for operation in batch.operations[:8])
    return f"The longest operations of the forward pass, in ms: {shown}."


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.micro.step_profile", description=__doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="print the page of an earlier run")
    parser.add_argument("--batches", type=parse_numbers, default=[1, 32], help="sequences that decode at once")
    parser.add_argument("--steps", type=int, default=20, help="that are timed at each batch (20)")
    parser.add_argument("--no-server", action="store_true", help="leave out the way to the client")
    add_engine_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
