"""What one long prompt does to the streams beside it, with targets for the wait between tokens and without.

`python -m loadtest.micro.long_prompt --target none --target 1.7x` steps an engine for each, in turns: streams alone,
then beside a prompt. Each token of a stream waits for a step, so a step's time is the wait. With `--processor-time` all
clocks, the engine's own included, count this process's processor time: for busy machines, and one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from engine.build import build_engine
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams, StepStats
from loadtest.micro.measure import Row, print_table, save
from loadtest.micro.own_server import HIGHEST_ID, LOWEST_ID
from loadtest.workload.prompts import draw_ids

NUM_STEPS_ALONE = 60
PROMPT_OF_STREAM = 64
NONE = "none"


def add(engine: Engine, name: str, num_prompt_tokens: int, max_tokens: int, *seed: int) -> str:
    random = np.random.default_rng((num_prompt_tokens, *seed))
    params = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0)
    prompt = draw_ids(random, num_prompt_tokens, (LOWEST_ID, HIGHEST_ID))
    engine.add(Request(request_id=name, prompt_token_ids=prompt, params=params))
    return name


def steps_until_end_of(engine: Engine, name: str) -> list[StepStats]:
    steps = []
    while True:
        outputs, _, stats = engine.step()
        steps.append(stats)
        if any(output.request_id == name and output.finish_reason for output in outputs):
            return steps


def measure(options: argparse.Namespace, milliseconds: float, number: int) -> Row:
    """Streams alone, streams beside a prompt, and before both a prompt alone. Each with tokens of their own."""
    settings: dict[str, dict[str, str | int | float | None]] = {
        "model": {"path": options.model},
        "device": {"num_threads": options.threads},
        "scheduler": {"target_itl_ms": milliseconds or None},
    }
    engine, _ = build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)
    alone = steps_until_end_of(engine, add(engine, "alone", options.prompt, 1, number, 0))
    for stream in range(options.streams):
        add(engine, f"stream {stream}", PROMPT_OF_STREAM, 100_000, number, 1, stream)
    while any(seq.first_token_at is None for seq in engine.scheduler.running) or len(engine.scheduler.waiting):
        engine.step()
    before = np.array([engine.step()[2].seconds for _ in range(NUM_STEPS_ALONE)])
    steps = steps_until_end_of(engine, add(engine, "beside", options.prompt, 1, number, 2))
    beside = np.array([step.seconds for step in steps])
    after = np.array([engine.step()[2].seconds for _ in range(NUM_STEPS_ALONE)])
    errors = [abs(step.seconds / step.predicted - 1) for step in steps if step.predicted]
    return {
        "alone: p50, ms": round(1e3 * float(np.median(before)), 1),
        "p99": round(1e3 * float(np.percentile(before, 99)), 1),
        "afterwards: p50": round(1e3 * float(np.median(after)), 1),
        "beside: p50, ms": round(1e3 * float(np.median(beside)), 1),
        "p99 ": round(1e3 * float(np.percentile(beside, 99)), 1),
        "p99 beside / alone": round(float(np.percentile(beside, 99) / np.percentile(before, 99)), 2),
        "steps": len(steps),
        "prompt beside, s": round(float(beside.sum()), 2),
        "prompt alone, s": round(sum(step.seconds for step in alone), 2),
        "off by, %": round(100 * median(errors or [0.0]), 1),
    }


def in_milliseconds(target: str, rows: Sequence[Row]) -> float:
    """0 for none."""
    if not target.endswith("x"):
        return 0.0 if target == NONE else float(target)
    waits = [float(row["alone: p50, ms"]) for row in rows if row["target"] == NONE]
    if not waits:
        raise ValueError(f"--target {target} needs a run with none; give --target none before it")
    return round(float(target[:-1]) * waits[-1], 1)


def medians(rows: Sequence[Row]) -> list[Row]:
    """A row for each target, of all rounds."""
    found: list[Row] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        values = {name: round(median(float(row[name]) for row in own), 2) for name in own[0] if name != "target"}
        found.append({"target": target, **values, "round": "median"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    times = "milliseconds, none, or 1.7x: times the median wait of streams alone in the last run with none; several"
    parser.add_argument("--target", action="append", default=[], help=times)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=6000, help="tokens (6000)")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="instead of the time on the wall")
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    options = parser.parse_args()
    if options.processor_time:
        vars(time)["perf_counter"] = time.process_time
    rows: list[Row] = []
    for number in range(options.rounds):
        for target in options.target or [NONE]:
            milliseconds = in_milliseconds(target, rows)
            rows.append({"target": target, "ms": milliseconds, "round": number})
            rows[-1].update(measure(options, milliseconds, number))
            print(rows[-1], flush=True)
    rows += medians(rows)
    print_table(rows)
    if options.save:
        print(save(f"long-prompt-{options.threads}t", rows))


if __name__ == "__main__":
    main()
