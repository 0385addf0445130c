"""What `device.kernels` stands for: how weights are packed, who runs the layers, who samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

import torch

from engine.attention.backend import ATTENTION_BACKENDS, AttentionBackend
from engine.batch.device_inputs import BatchBuilder
from engine.kv_cache.storage import KVCache
from engine.lazy_import import load_object
from engine.models.llama import Llama
from engine.models.model import Model
from engine.models.operations import load_operations
from engine.planning.engine_plan import MemoryPlan
from engine.quantization.linear import LinearMethods
from engine.quantization.method import formats_of, make_methods
from engine.runner.model_runner import ModelRunner
from engine.runner.strict_runner import OneTokenRunner
from engine.sampling.sampler import SAMPLERS, TokenSampler
from kernels.layout import PANEL

if TYPE_CHECKING:
    from engine.attention.numba_backend import NumbaAttention
    from engine.runner.cuda_graphs import GraphDevice
    from kernels.numba.program.team import Team


@dataclass(frozen=True, slots=True)
class KernelBackend:
    """The parts of an engine that depend on the kernels. is_strict: `device.determinism`

    A module is imported when its kernels are wanted: one compiles, the other needs a package of its own.
    """

    plan: MemoryPlan
    is_strict: bool
    is_torch_only: bool = False  # somebody wants no compiled kernels at all

    def has_compiled_attention(self, model: Model) -> bool:
        """Whether the KV cache is read by compiled loops, under compiled layers or, on a CPU, under torch's.

        Its rows are independent of each other, and under torch's layers it is as fast as torch's own or faster.
        """
        plan = self.plan
        if plan.kernels == "numba":
            return True
        fits = plan.block_size % PANEL == 0 and all(layer.head_dim % PANEL == 0 for layer in model.attention_layers)
        return plan.kernels == "torch" and plan.device == "cpu" and fits and not self.is_torch_only

    def compile(self) -> None:
        """Compiles the CPU's kernels, or reads what was compiled before."""
        import_module("kernels.numba.program.team")

    @property
    def linear_methods(self) -> LinearMethods:
        """How matrices are kept from the moment when they are loaded."""
        plan = self.plan
        return make_methods(
            formats_of(plan.kernels),
            plan.quantization,
            num_threads=plan.num_threads,
            keeps_tables=plan.kernels == "numba",
            activations=plan.model_config.activations,
        )

    def prepare(self, model: Model) -> bool:
        """Gives a loaded model its operations, in place. Leaves torch the threads that it may use.

        Returns whether a row's numbers depend on the row alone from then on, if that is known.
        """
        plan = self.plan
        if plan.kernels == "numba":
            torch.set_num_threads(1)  # ours multiply; its own would spin beside them
            return True
        model.operations = load_operations(plan.kernels)
        if self._fixes_rows and isinstance(model, Llama):
            from engine.runner.strict_linear import fix_rows

            fix_rows(model)
            return True
        if not self.has_compiled_attention(model):
            return False
        from engine.runner.padded_rows import make_rows_independent

        return make_rows_independent(model, is_strict=self.is_strict)

    def make_attention(self, cache: KVCache) -> AttentionBackend:
        """Torch's or Triton's attention over a cache."""
        if self._fixes_rows:
            from engine.attention.triton_backend import TritonAttention

            return TritonAttention(cache, one_path=True)
        make = cast(Callable[[KVCache], AttentionBackend], load_object(ATTENTION_BACKENDS[self.plan.kernels]))
        return make(cache)

    def make_runner(
        self, model: Model, cache: KVCache, *, has_independent_rows: bool, beside: ModelRunner | None = None
    ) -> ModelRunner:
        """has_independent_rows: as `prepare` found it; where it is asked for and not so, tokens go one by one.

        beside: that of another model, whose threads run this one too
        """
        plan = self.plan
        if plan.kernels == "numba":  # strict or not: there, a row's result depends on nothing but the row
            return make_numba_runner(model, cache, plan, _team_of(beside))
        goes_one_by_one = self.is_strict and not has_independent_rows
        if plan.graphs.total and not goes_one_by_one:
            from engine.runner.cuda_graphs import CudaGraphDevice

            return make_gpu_runner(model, cache, plan, CudaGraphDevice(), one_path=self.is_strict)
        if cache.codec.keys_as_columns:
            attention: AttentionBackend = make_numba_attention(model, cache, plan, _team_of(beside))
        else:
            attention = self.make_attention(cache)
        runner = OneTokenRunner if goes_one_by_one else ModelRunner
        return runner(model, cache, attention)

    def make_sampler(self, vocab_size: int) -> TokenSampler:
        make = cast(Callable[..., TokenSampler], load_object(SAMPLERS[self.plan.kernels]))
        return make(vocab_size, num_threads=self.plan.num_threads)

    @property
    def _fixes_rows(self) -> bool:
        """Whether strict determinism comes from products of one shape, for models whose products we know: on a GPU."""
        return self.is_strict and self.plan.kernels == "triton" and self.plan.device == "cuda"


def make_gpu_runner(
    model: Model, cache: KVCache, plan: MemoryPlan, graph_device: GraphDevice, *, one_path: bool = False
) -> ModelRunner:
    """Graphs are captured while requests are served; here, they get the memory that the plan has for them.

    one_path: as of `TritonAttention`
    """
    from engine.attention.triton_backend import TritonAttention, make_graph_space
    from engine.runner.cuda_graphs import GraphLimits, GraphRunner

    device = cache.device
    space = make_graph_space(
        model.attention_layers,
        plan.dtype,
        device,
        max_context=plan.max_model_len + plan.num_drafts,
        num_bytes=plan.graphs.attention,
    )
    attention, builder = TritonAttention(cache, graph_space=space, one_path=one_path), BatchBuilder(device)
    limits = GraphLimits(
        max_num_seqs=plan.max_num_seqs,
        max_rows_per_seq=1 + plan.num_drafts,
        max_num_blocks=-(-space.max_context // plan.block_size),
        num_groups=len(plan.windows),
    )
    graphs = GraphRunner(model, attention, builder, limits=limits, graph_device=graph_device, device=device)
    return ModelRunner(model, cache, attention, builder=builder, graphs=graphs)


def make_numba_runner(model: Model, cache: KVCache, plan: MemoryPlan, team: Team | None = None) -> ModelRunner:
    """A runner of a packed Llama. Leave torch one thread: its others would spin beside ours."""
    from engine.models.llama_numba import NumbaLlama

    assert isinstance(model, Llama), "the plan says what can be compiled"
    attention = make_numba_attention(model, cache, plan, team)
    return ModelRunner(NumbaLlama(model, attention, attention.team, dtype=plan.dtype), cache, attention)


def make_numba_attention(model: Model, cache: KVCache, plan: MemoryPlan, team: Team | None = None) -> NumbaAttention:
    """Compiled attention and the team of threads that runs it, under compiled layers or torch's.

    team: one that is there; a second one would spin beside it. Not if its threads have too little memory.
    """
    from engine.attention.numba_backend import NumbaAttention, scratch_bytes
    from kernels.numba.program.team import Team

    needed = scratch_bytes(model.attention_layers, cache.block_size)
    if team is None or team.scratch_bytes < needed:
        team = Team(plan.num_threads, scratch_bytes=needed)
    return NumbaAttention(cache, team)


def _team_of(runner: ModelRunner | None) -> Team | None:
    return None if runner is None else getattr(runner.attention, "team", None)
