"""How long work on a device takes: medians of alternating rounds, with inputs that the caches do not hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import torch

Work = Callable[[int], object]  # takes the number of the input set to work on
Replay = Callable[[], object]

_ROUND = 0.001  # seconds that a round of one candidate should at least take
_MAX_CALLS = 256


class Stopwatch:
    """Times candidates in turns, so that whatever else changes (clocks, heat) changes for all of them.

    On a GPU a round is one replay of a CUDA graph of many calls, which leaves the host out; work that cannot be
    captured is launched call by call.
    """

    def __init__(self, device: torch.device, *, num_rounds: int = 11) -> None:
        self._device = device
        self._num_rounds = 1 if device.type == "cpu" else num_rounds

    def time(self, work: Work, *, num_sets: int = 1) -> float:
        return self.compare({"": work}, num_sets=num_sets)[""]

    def compare(
        self, works: Mapping[str, Work], *, num_sets: int = 1, launched: Collection[str] = ()
    ) -> dict[str, float]:
        """Median seconds per call of each. Calls go through the input sets in turn.

        launched: those that no graph can hold, because they wait for the device
        """
        rounds = {name: self._round(work, num_sets, name in launched) for name, work in works.items()}
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self._num_rounds):
            for name, (replay, num_calls) in rounds.items():
                seconds[name].append(self._once(replay) / num_calls)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def _round(self, work: Work, num_sets: int, is_launched: bool) -> tuple[Replay, int]:
        if self._device.type == "cpu":  # a rehearsal
            return lambda: work(num_sets - 1), 1
        for index in range(min(3, num_sets)):  # compiles, and allocates what is kept
            work(index)
        once = max(1e-7, self._once(lambda: work(0)))
        num_calls = max(num_sets, min(_MAX_CALLS, int(_ROUND / once) + 1))

        def calls() -> None:
            for index in range(num_calls):
                work(index % num_sets)

        return calls if is_launched else _captured(calls), num_calls

    def _once(self, replay: Replay) -> float:
        if self._device.type == "cpu":
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _captured(calls: Replay) -> Replay:
    before = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(before)
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:  # it waits for the device after all
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        return calls
    graph.replay()
    return graph.replay


def num_sets(num_bytes: int, l2_bytes: int) -> int:
    """So many sets of inputs of this size that together they are four times the second-level cache; at most 64.

    Smaller ones still come from the cache, as a model's activations do.
    """
    return max(1, min(64, -(-4 * l2_bytes // max(1, num_bytes))))
