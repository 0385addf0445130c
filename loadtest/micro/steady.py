"""An engine in this process, brought to a steady state: so many sequences that decode, so many requests that wait."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.build import build_engine
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo
from engine.runner.executor import ModelExecutor
from engine.types import Request, SamplingParams, StepStats
from loadtest.micro.measure import RESULTS
from loadtest.micro.own_server import LOWEST_ID

PARTS = ("schedule", "forward", "sample", "update", "propose")  # of a step, as StepStats names them
NUM_WARMUP_STEPS = 3
NUM_WAITING_TOKENS = 128  # the prompt of a waiting request
ROOM = 160  # KV tokens per sequence beside its context: what admission keeps free, and rounding to blocks


@dataclass(frozen=True)
class State:
    """What a step is measured in. context: about so many tokens each, more by those that the first to start decode
    while the prompts of the last are computed"""

    num_running: int
    context: int
    num_waiting: int = 0


@dataclass(frozen=True)
class StepTimes:
    """Medians over steps, in seconds. whole: the call of `Engine.step`; parts: its laps, and "other", the rest of it.

    bytes_moved, flops: what the model's arithmetic demands of the last step
    """

    whole: float
    parts: dict[str, float]
    bytes_moved: int
    flops: int

    def share(self, part: str) -> float:
        return self.parts[part] / self.whole


@dataclass(frozen=True)
class TimedStep:
    seconds: float
    stats: StepStats


class SteadyEngine:
    """Measures an engine in one state after another; a state leaves nothing behind."""

    def __init__(self, engine: Engine, model: ModelInfo) -> None:
        self.engine, self.model = engine, model
        self._num_added = 0
        self._unfinished: list[str] = []
        self._random = np.random.default_rng(0)

    @property
    def settings(self) -> dict[str, str | int | float | bool | None]:
        """Every "auto" as it was resolved."""
        return {name: setting.value for name, setting in self.model.settings.items()}

    @property
    def executor(self) -> ModelExecutor:
        assert isinstance(self.engine.executor, ModelExecutor), "the engine was built in this process"
        return self.engine.executor

    def measure(self, state: State, *, num_steps: int) -> StepTimes:
        """Times `num_steps` decoding steps, after some to warm up. ValueError where the state does not fit."""
        try:
            self.fill(state, num_steps=num_steps + NUM_WARMUP_STEPS)
            for _ in range(NUM_WARMUP_STEPS):
                self.engine.step()
            return medians([timed_step(self.engine) for _ in range(num_steps)])
        finally:
            self.clear()

    def fill(self, state: State, *, num_steps: int) -> None:
        """Adds requests and computes their prompts; at least `num_steps` steps that only decode can follow."""
        limits, num_prompt = self.engine.scheduler.limits, state.context - num_steps
        if num_prompt < 1 or state.context > limits.max_model_len or state.num_running > limits.max_num_seqs:
            raise ValueError(
                f"{state} with {num_steps} steps does not fit: the context must be over {num_steps} and up to "
                f"{limits.max_model_len} tokens, and up to {limits.max_num_seqs} sequences may run"
            )
        running = [self._add(num_prompt, limits.max_model_len - num_prompt) for _ in range(state.num_running)]
        beginning = set(running)
        while beginning:
            outputs, _, _ = self.engine.step()
            beginning -= {output.request_id for output in outputs if output.token_ids}
        for _ in range(state.num_waiting):
            self._add(min(NUM_WAITING_TOKENS, limits.max_model_len - 1), 1)

    def clear(self) -> None:
        for request_id in self._unfinished:
            self.engine.abort(request_id)
        self._unfinished.clear()
        while self.engine.has_work:
            self.engine.step()

    def _add(self, num_prompt_tokens: int, max_tokens: int) -> str:
        """A greedy request with a random prompt and no end of its own."""
        request_id = f"request-{self._num_added}"
        self._num_added += 1
        ids: list[int] = self._random.integers(LOWEST_ID, self.model.vocab_size, size=num_prompt_tokens).tolist()
        params = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0)
        self.engine.add(Request(request_id=request_id, prompt_token_ids=ids, params=params))
        self._unfinished.append(request_id)
        return request_id


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of which engine is measured, and where the result goes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"directory, hub id or .gguf file ({DEFAULT_MODEL})")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights of the model's shapes")
    parser.add_argument("--quantization", default="auto", help="as in model.quantization")
    parser.add_argument("--kernels", default="auto", help="as in device.kernels")
    parser.add_argument("--threads", default="auto", help="as in device.num_threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result (loadtest/results)")


def build_steady(options: argparse.Namespace, states: Sequence[State]) -> SteadyEngine:
    """An engine with room for each of the states, as `add_engine_options` describes it."""
    config = {
        "model": {"path": options.model, "load_format": options.load_format, "quantization": options.quantization},
        "device": {
            "kernels": options.kernels,
            "num_threads": options.threads if options.threads == "auto" else int(options.threads),
        },
        "scheduler": {"max_num_seqs": max(state.num_running for state in states)},
        "kv_cache": {"memory": f"{max(state.num_running * (state.context + ROOM) for state in states)}tokens"},
    }
    engine, model = build_engine(EngineConfig.model_validate(config), lambda phase, detail: None)
    gc.collect()
    gc.freeze()  # as the engine process does
    return SteadyEngine(engine, model)


def timed_step(engine: Engine) -> TimedStep:
    start = time.perf_counter()
    _, _, stats = engine.step()
    return TimedStep(time.perf_counter() - start, stats)


def medians(steps: Sequence[TimedStep]) -> StepTimes:
    parts = {part: statistics.median(getattr(step.stats, part) for step in steps) for part in PARTS}
    whole = statistics.median(step.seconds for step in steps)
    last = steps[-1].stats
    return StepTimes(whole, {**parts, "other": max(whole - sum(parts.values()), 0.0)}, last.bytes_moved, last.flops)
