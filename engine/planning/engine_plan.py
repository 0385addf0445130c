"""The memory plan: what the weights take, what is left for the KV cache, and what fits, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.config import EngineConfig, LossySpeculationConfig, ModelConfig, SpeculationConfig
from engine.ipc.messages import Setting
from engine.kv_cache.codec import make_codec
from engine.kv_cache.layer_spec import windows_of
from engine.loading.loader import read_model_facts
from engine.loading.loading_peak import COMPILER_BYTES
from engine.loading.model_facts import ModelFacts
from engine.loading.notes import length_notes, rounding_notes
from engine.models.model_error import ModelError
from engine.planning.lossy import check_lossy
from engine.planning.machine import Machine
from engine.planning.resolve import (
    Resolved,
    resolve_device,
    resolve_dtype,
    resolve_kernels,
    resolve_kv_dtype,
    resolve_limits,
    resolve_num_threads,
    resolve_quantization,
    resolve_step_rate,
    step_name,
)
from engine.planning.sizes import DTYPES, MAX_NUM_GRAPHS, GraphDemand, PlanError, Sizer, gib
from engine.planning.stored_formats import stored_notes
from engine.speculation.proposer import ProposerNeeds, TargetShape, needs_of

__all__ = ["MemoryPlan", "PlanError", "plan_memory", "render_plan"]

RESOLVED_SETTINGS = (
    "device.name",
    "device.kernels",
    "device.num_threads",
    "model.dtype",
    "model.quantization",
    "model.max_model_len",
    "scheduler.max_num_seqs",
    "scheduler.max_num_batched_tokens",
    "kv_cache.memory",
    "kv_cache.dtype",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The bytes of everything in memory, and what fits. `settings`: every resolved "auto", by its config key."""

    facts: ModelFacts
    model_config: ModelConfig  # with the resolved length, dtype and quantization
    device: str
    kernels: str  # torch, triton or numba
    num_threads: int
    step_name: str  # the key under which the measured rate of such steps is kept
    total_bytes: int  # of the device
    available_bytes: int
    linear_bytes: int
    embedding_bytes: int  # and everything else that is no linear layer
    expert_bytes: int  # of those, at most; in many formats of linear layers, experts are kept in the model's dtype
    loading_bytes: int  # at the peak while weights are loaded and packed
    process_bytes: int  # of the process itself, with its libraries
    workspace_bytes: int  # of the largest step, besides weights and cache
    speculation_bytes: int  # of the proposer: its weights, and the workspace of its own steps
    draft: MemoryPlan | None  # of the draft model, if there is one; its cache is counted in `kv_bytes_per_token` here
    graphs: GraphDemand
    kv_bytes_per_token: int
    block_size: int  # tokens
    num_blocks: int  # of all groups of layers together
    blocks_per_sequence: int  # of max_model_len and its look-ahead, at most
    needs: ProposerNeeds  # with those of the draft model, if there is one
    dtype: torch.dtype
    quantization: str  # a key of what quantization.method.formats_of has for the kernels
    kv_codec: str  # a key of kv_cache.codec.KV_CODECS
    max_model_len: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_logits: int  # rows of logits in one step
    settings: dict[str, Setting]

    @property
    def notes(self) -> list[str]:
        """What is served otherwise than files suggest, and what becomes of stored formats."""
        return [
            *self.facts.notes,
            *self.stored_notes,
            *length_notes(self.facts, self.max_model_len),
            *rounding_notes(self.model_config.activations),
        ]

    @property
    def stored_notes(self) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        return stored_notes(self.facts, kernels=self.kernels, quantization=self.quantization, dtype=dtype)

    @property
    def weight_bytes(self) -> int:
        return self.linear_bytes + self.embedding_bytes

    @property
    def can_load(self) -> bool:
        """Whether the peak while loading fits into the free memory. If not, the system may kill the process."""
        return self.loading_bytes <= self.available_bytes

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of what the cache stores."""
        return make_codec(self.kv_codec).dtype

    @property
    def num_drafts(self) -> int:
        """Of a sequence that a step verifies, at most."""
        return self.needs.num_drafts

    @property
    def draft_kv_bytes_per_token(self) -> int:
        """Of `kv_bytes_per_token`, the proposer's: it has a block for each block of each group."""
        return self.needs.kv_bytes_per_token * len(self.windows)

    @property
    def target(self) -> TargetShape:
        """What proposers are told of the model."""
        return _target_shape(self.facts, self.block_size)

    @property
    def windows(self) -> list[int | None]:
        """Of each group of layers; None where they see the whole text."""
        return windows_of(self.facts.attention_layers)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that fit if every layer keeps all of them; of longer texts than its windows, more do."""
        return self.num_blocks // len(self.windows) * self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_tokens * self.kv_bytes_per_token

    @property
    def num_full_sequences(self) -> int:
        """Sequences of max_model_len that fit at once."""
        return self.num_blocks // self.blocks_per_sequence


def plan_memory(
    facts: ModelFacts, config: EngineConfig, machine: Machine, *, measured_workspace: int | None = None
) -> MemoryPlan:
    """Makes the plan: resolves each "auto", and fits the KV cache into the memory.

    measured_workspace: the bytes that a largest step took (`engine.runner.memory_profile`), in place of the estimate.
    PlanError where not even one sequence of max_model_len and its look-ahead fits, SettingError for a setting that
    cannot be honoured.
    """
    device = resolve_device(config, machine)
    kernels = resolve_kernels(config, device.value, facts.why_not_compiled)
    dtype = resolve_dtype(config, machine, device.value, kernels.value, is_bfloat16=facts.is_bfloat16)
    quantization = resolve_quantization(config, machine, device.value, kernels.value, dtype.value, facts.stored)
    kv_dtype = resolve_kv_dtype(config, machine, facts, device=device.value, dtype=dtype.value, kernels=kernels.value)
    num_threads = resolve_num_threads(config, machine)
    chosen = device.value, kernels.value, quantization.value
    steps = step_name(facts, *chosen[1:], (dtype.value, config.model.activations), num_threads.value)
    step_rate = resolve_step_rate(machine, steps, num_threads=num_threads.value)
    draft, needs = _plan_draft(facts, config, machine)
    max_num_seqs, max_num_batched_tokens = resolve_limits(config, device.value, facts, step_rate=step_rate)
    sizer = Sizer(facts, config, machine, *chosen, needs, num_threads.value, measured_workspace)
    limits = {"max_num_seqs": max_num_seqs.value, "max_num_batched_tokens": max_num_batched_tokens.value}
    demand = sizer.demand(dtype.value, kv_dtype.value, **limits)
    size = sizer.cache_tokens(demand, max_num_seqs.value)
    num_blocks = size.value // sizer.block_size * sizer.num_groups
    max_model_len = sizer.length(demand, num_blocks)
    resolved = {"max_model_len": max_model_len.value, "dtype": dtype.value, "quantization": quantization.value}
    return MemoryPlan(
        facts=facts,
        model_config=config.model.model_copy(update=resolved),
        device=device.value,
        kernels=kernels.value,
        num_threads=num_threads.value,
        step_name=steps,
        total_bytes=machine.total_bytes,
        available_bytes=machine.available_bytes,
        linear_bytes=demand.linear,
        embedding_bytes=demand.embedding, expert_bytes=demand.experts,
        loading_bytes=demand.loading,
        process_bytes=machine.process_bytes + (COMPILER_BYTES if kernels.value == "numba" else 0),
        workspace_bytes=demand.workspace,
        speculation_bytes=demand.speculation,
        draft=draft,
        graphs=demand.graphs,
        kv_bytes_per_token=demand.kv_per_token,
        block_size=sizer.block_size,
        num_blocks=num_blocks,
        blocks_per_sequence=sizer.num_blocks_for(max_model_len.value, demand),
        needs=needs,
        dtype=DTYPES[dtype.value],
        quantization=quantization.value,
        kv_codec=kv_dtype.value,
        max_model_len=max_model_len.value,
        **limits,
        max_num_logits=demand.num_logits,
        settings=_settings(
            device, kernels, num_threads, dtype, quantization, max_model_len, max_num_seqs, max_num_batched_tokens,
            Resolved(f"{size.value // sizer.block_size * sizer.block_size}tokens", size.source, size.reason), kv_dtype,
        ),
    )  # fmt: skip


def _plan_draft(facts: ModelFacts, config: EngineConfig, machine: Machine) -> tuple[MemoryPlan | None, ProposerNeeds]:
    """The draft model's plan, if there is to be one, and what the proposer needs with it."""
    check_lossy(config)
    needs = needs_of(config.speculation, _target_shape(facts, config.kv_cache.block_size))
    if config.speculation.method != "draft_model":
        return None, needs
    model = ModelConfig(
        path=str(config.speculation.model),
        load_format="dummy" if config.model.load_format == "dummy" else "auto",
    )
    update = {"model": model, "speculation": SpeculationConfig(), "lossy_speculation": LossySpeculationConfig()}
    draft_config = config.model_copy(update=update)
    try:
        draft = plan_memory(read_model_facts(model), draft_config, machine)
    except ModelError as error:
        raise ModelError(f"speculation.model: {error}") from error
    used = draft.weight_bytes + draft.workspace_bytes
    return draft, replace(needs, num_bytes=used, kv_bytes_per_token=draft.kv_bytes_per_token)


def _target_shape(facts: ModelFacts, block_size: int) -> TargetShape:
    return TargetShape(
        path=facts.path,
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        num_layers=len(facts.attention_layers),
        block_size=block_size,
    )


def _settings(*resolved: Resolved[str] | Resolved[int]) -> dict[str, Setting]:
    return {name: one.setting for name, one in zip(RESOLVED_SETTINGS, resolved, strict=True)}


def render_plan(plan: MemoryPlan) -> str:
    """The plan as a table for a terminal."""
    facts = plan.facts
    graph_bytes = plan.graphs.total
    used = plan.weight_bytes + plan.workspace_bytes + plan.speculation_bytes + graph_bytes + plan.kv_bytes
    rows = [
        ("model", f"{facts.path} ({facts.architecture}, {facts.num_parameters / 1e6:,.1f} M parameters)"),
        ("device", f"{plan.device}, {gib(plan.available_bytes)} free of {gib(plan.total_bytes)}"),
        ("linear weights", gib(plan.linear_bytes)),
        ("embedding and norms", gib(plan.embedding_bytes - plan.expert_bytes)),
        *([("experts", gib(plan.expert_bytes))] if plan.expert_bytes else []),
        ("workspace", f"{gib(plan.workspace_bytes)}, {_largest_step(plan)}"),
        *([("speculation", _speculation(plan))] if plan.speculation_bytes else []),
        *([("CUDA graphs", f"{gib(graph_bytes)}, for up to {MAX_NUM_GRAPHS} sizes of step")] if graph_bytes else []),
        ("KV cache", f"{gib(plan.kv_bytes)}, {plan.kv_bytes_per_token:,} bytes per token"),
        ("total", gib(used)),
        ("peak while loading", _loading(plan)),
        ("concurrent tokens", _cache(plan)),
        ("longest sequences", f"{plan.num_full_sequences:,} of {plan.max_model_len:,} tokens at once"),
    ]
    width = max(len(name) for name in [*(name for name, _ in rows), *plan.settings])
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", *(_setting_line(name, setting, width) for name, setting in plan.settings.items())]
    notes = plan.notes
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    return "\n".join(lines)


def _loading(plan: MemoryPlan) -> str:
    """Where it is the process's own memory, as the system counts it; what a GPU's model takes on the host is little."""
    if plan.device != "cpu":
        return f"{gib(plan.loading_bytes)} on the device"
    whole = gib(plan.loading_bytes + plan.process_bytes)
    stays = gib(plan.weight_bytes)
    text = f"{whole}: {stays} of weights that stay, the largest matrix in floats; {gib(plan.process_bytes)} the process"
    return text if plan.can_load else f"{text}; MORE THAN IS FREE"


def _speculation(plan: MemoryPlan) -> str:
    if plan.draft is None:
        return gib(plan.speculation_bytes)
    facts = plan.draft.facts
    return f"{gib(plan.speculation_bytes)}, {facts.path} ({facts.num_parameters / 1e6:,.1f} M parameters)"


def _cache(plan: MemoryPlan) -> str:
    text = f"{plan.num_kv_tokens:,} in {plan.num_blocks:,} blocks of {plan.block_size}"
    if len(plan.windows) == 1:
        return text
    num_bounded = sum(window is not None for window in plan.windows)
    return f"{text}, or more: {num_bounded} of {len(plan.windows)} groups of layers keep a window's only"


def _largest_step(plan: MemoryPlan) -> str:
    return f"steps of up to {plan.max_num_batched_tokens:,} tokens, with {plan.max_num_logits:,} rows of logits"


def _setting_line(name: str, setting: Setting, width: int) -> str:
    reason = f": {setting.reason}" if setting.reason else ""
    return f"{name:<{width}}  {setting.value}  ({setting.source}{reason})"
