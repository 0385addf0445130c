"""Decoding steps as CUDA graphs: recorded once per size, and replayed with one call instead of hundreds of launches.

Which steps: those in which every sequence decodes one token or verifies a chain of drafts. Prompt chunks, trees of
drafts and large batches run eagerly; there, launching costs little beside computing.

Which sizes: a batch is padded to the next size (`padded_sizes`). Padding changes no result, because rows do not see
each other: rows of no sequence write no keys, and nobody reads what comes out of them.

When: never before serving starts. A size that has come up a few times is captured in the step that needs it next, one
at a time, with many eager steps in between, so that no stream stalls for long. Where a capture fails, steps go on as
they did, and it is tried again after a while.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.backend import AttentionBackend
from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.batch.step_inputs import StepInputs
from engine.circuit_breaker import CircuitBreaker
from engine.models.model import Model
from engine.planning.sizes import MAX_GRAPH_ROWS, MAX_NUM_GRAPHS
from engine.runner.graph_inputs import GraphSize, StaticBatch

logger = logging.getLogger(__name__)

NUM_USES = 3  # eager steps of a size before it is worth a graph
NUM_STEPS_BETWEEN = 32  # eager steps between two captures


class CapturableAttention(AttentionBackend, Protocol):
    """Attention whose work can be captured for sequences of any lengths."""

    def plan_any_lengths(self, batch: ForwardBatch, rows_per_seq: int) -> None:
        """As `plan`, with nothing that depends on the lengths but what the device computes from the batch's tensors."""
        ...

    def has_room(self, seq_lens: NDArray[np.int64], rows_per_seq: int) -> bool:
        """Whether what was captured can attend to contexts of these lengths."""
        ...


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> Tensor:
        """Repeats the work on what its inputs hold now. Returns its output, the same memory each time."""
        ...


class GraphDevice(Protocol):
    """The border to the device."""

    def capture(self, work: Callable[[], Tensor]) -> Graph:
        """Runs the work once, so that all it needs is made and compiled, and captures it. May raise anything."""
        ...


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self._output = graph, output

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._output


class CudaGraphDevice:
    """CUDA's graphs, on a stream of their own while they are captured. They share their scratch memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> Graph:
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            work()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = work()
        except Exception:  # an invalid capture raises once more when it ends, and torch then stays on its stream
            torch.cuda.set_stream(before)
            raise
        return CudaGraph(graph, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """max_rows_per_seq: 1, or 1 + the drafts of a sequence; max_num_blocks: of one sequence in one group of layers."""

    max_num_seqs: int
    max_rows_per_seq: int
    max_num_blocks: int
    num_groups: int = 1  # of layers: `AttentionLayer.group`
    max_num_graphs: int = MAX_NUM_GRAPHS
    num_uses: int = NUM_USES
    num_steps_between: int = NUM_STEPS_BETWEEN

    @property
    def max_num_rows(self) -> int:
        return min(MAX_GRAPH_ROWS, self.max_num_seqs * self.max_rows_per_seq)


def padded_sizes(max_num_rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... 256, 288, 320, ...: at most seven rows of padding, above 256 at most an eighth."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_rows + 32, 32)]
    return [size for size in sizes if size < max_num_rows] + [max_num_rows]


class GraphRunner:
    """Runs the steps that a graph covers, and captures those graphs. One of `.model_runner.DecodeGraphs`."""

    def __init__(
        self,
        model: Model,
        attention: CapturableAttention,
        builder: BatchBuilder,
        *,
        limits: GraphLimits,
        graph_device: GraphDevice,
        device: torch.device,
    ) -> None:
        self._model, self._attention, self._builder = model, attention, builder
        self._limits, self._graph_device = limits, graph_device
        self._static = StaticBatch(
            limits.max_num_rows,
            max_num_seqs=limits.max_num_seqs,
            max_num_blocks=limits.max_num_blocks,
            num_groups=limits.num_groups,
            device=device,
        )
        self._sizes = padded_sizes(limits.max_num_rows)
        self._graphs: OrderedDict[GraphSize, Graph] = OrderedDict()  # the one used last comes last
        self._num_uses: Counter[GraphSize] = Counter()  # of sizes without a graph
        self._num_steps = limits.num_steps_between  # eager ones since the last capture
        self.breaker = CircuitBreaker()

    def forward(self, inputs: StepInputs, tokens: Tensor | None) -> Tensor | None:
        """The hidden states of the step's rows, [num_tokens, hidden_size], valid until the next call.

        None where no graph covers the step: it then has to run eagerly. tokens: as in `ModelRunner.forward`
        """
        self.breaker.step()
        size = self._size_of(inputs)
        if size is None or not (size in self._graphs or self._should_capture(size)):
            return None
        if inputs.tree_mask is not None or not self._attention.has_room(inputs.seq_lens, size.rows_per_seq):
            return None
        tables = self._builder.tables
        tables.change(inputs.table_changes)
        self._static.fill(inputs, tables.read(inputs), size, tokens)
        graph = self._graphs.get(size) or self._capture(size)
        if graph is None:
            return None
        self._graphs.move_to_end(size)
        return graph.replay()[: inputs.num_tokens]

    def clear(self) -> None:
        self._graphs.clear()

    def _size_of(self, inputs: StepInputs) -> GraphSize | None:
        """The size that the step is padded to. None: it has a prompt chunk, or too many rows."""
        if not inputs.is_decoding:
            return None
        num_seqs = inputs.num_seqs
        longest = 1 if num_seqs == inputs.num_tokens else int(np.diff(inputs.query_starts).max())
        return self._padded(inputs.num_tokens, longest, num_seqs)

    def _padded(self, num_rows: int, longest: int, num_seqs: int) -> GraphSize | None:
        """longest: rows of a sequence"""
        limits = self._limits
        if num_rows > limits.max_num_rows or longest > limits.max_rows_per_seq or num_seqs > limits.max_num_seqs:
            return None
        padded = self._sizes[bisect_left(self._sizes, num_rows)]
        return GraphSize(padded, min(padded, limits.max_num_seqs), 1 if longest == 1 else limits.max_rows_per_seq)

    def _should_capture(self, size: GraphSize) -> bool:
        """Counts an eager step of this size. True where it is to be captured instead."""
        self._num_steps += 1
        self._num_uses[size] += 1
        is_due = self._num_uses[size] > self._limits.num_uses and self._num_steps > self._limits.num_steps_between
        return is_due and not self.breaker.is_open

    def _capture(self, size: GraphSize) -> Graph | None:
        """A graph that reads the static batch. None where it cannot be had; the step has to run eagerly then."""
        batch = self._static.view(size)

        def work() -> Tensor:
            self._attention.plan_any_lengths(batch, size.rows_per_seq)
            return self._model.forward(batch, self._attention)

        if len(self._graphs) >= self._limits.max_num_graphs:
            self._graphs.popitem(last=False)
        self._num_steps = 0
        try:
            graph = self._graphs[size] = self._graph_device.capture(work)
        except Exception:  # whatever the reason: if the device is lost, the step that runs now instead will tell
            logger.exception("a step of %d rows could not be captured; no CUDA graphs are made for now", size.num_rows)
            self.breaker.trip()
            return None
        del self._num_uses[size]
        return graph
