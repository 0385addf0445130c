"""The composition root: reads the config, resolves every "auto" once, and puts the engine together."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar_compiler import GrammarCompiler
from engine.ipc.messages import ModelInfo, Setting
from engine.kv_cache.codec import make_codec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.loading.loader import LoadedModel, load_model, read_model_facts
from engine.planning.ceilings import ceilings_file, release, with_ceilings
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.kv_range import bound_of_keys_and_values, overflow_note, with_cache_that_holds
from engine.planning.lossy import lossy_notes
from engine.planning.machine import Ceilings, Machine, freeing_at_once, read_machine
from engine.planning.resolve import limit_instructions, resolve_device
from engine.planning.sizes import gib
from engine.runner.draft_executor import open_draft_model
from engine.runner.executor import ModelExecutor
from engine.runner.kept_weights import kept_weights
from engine.runner.kernel_backend import KernelBackend
from engine.runner.memory_profile import CudaMemoryMeter, measure_workspace, plan_with_workspace
from engine.runner.model_runner import ModelRunner
from engine.runner.step_recording import StepRecording
from engine.runner.step_timing import time_chunks, time_steps
from engine.runner.trial import try_one_token
from engine.sampling.typical import TypicalRule
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.prompt_pacing import PromptPacing
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost, StepPace
from engine.scheduling.step_times import ContextCosts, StepTimes
from engine.speculation.controller import DraftController
from engine.speculation.proposer import Proposer, ProposerContext, build_proposer
from engine.speculation.speculator import Speculator
from engine.speculation.step_costs import StepCosts
from engine.structured.grammar_states import GrammarStates

logger = logging.getLogger(__name__)

MIN_PROMPT_SHARE = 8  # fewer cost compiled layers much more each: of 8, a token takes 1.15 times as long as of 80

Report = Callable[[str, str], None]


class PhaseClock:
    """Reports each phase of the start as it begins, and remembers how long it took, in seconds."""

    def __init__(self, report: Report) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report
        self._name, self._started_at = "", time.monotonic()

    def enter(self, name: str, detail: str = "") -> None:
        self.end()
        self._name = name
        self._report(name, detail)

    def end(self) -> None:
        now = time.monotonic()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._started_at
        self._name, self._started_at = "", now


def build_engine(config: EngineConfig, report: Report) -> tuple[Engine, ModelInfo]:
    """Loads the model and makes the engine that serves it. `report(phase, detail)` hears of each phase as it starts.

    ValueError for what the user can mend: its `kind`, if it has one, is "config", "model" or "memory".
    """
    clock = PhaseClock(report)
    limit_instructions(config.device.cpu_features)
    clock.enter("measure", "the machine's ceilings")
    machine = read_machine()
    machine = with_ceilings(machine, resolve_device(config, machine).value)
    clock.enter("plan", config.model.path)
    facts = read_model_facts(config.model, report=clock.enter)
    plan = plan_memory(facts, config, machine)
    for note in [*plan.notes, *lossy_notes(config)]:
        report("note", note)
    back_end = KernelBackend(plan, is_strict=config.device.is_strict, is_torch_only=config.device.kernels == "torch")
    with freeing_at_once():
        loaded, bound, has_independent_rows = _load(config, plan, back_end, clock)
    plan = with_cache_that_holds(plan, bound, config, machine)
    if (overflow := overflow_note(plan, bound)) is not None:
        report("note", overflow)
    back_end = replace(back_end, plan=plan)
    if plan.device == "cuda":
        clock.enter("profile", f"a step of {plan.max_num_batched_tokens:,} tokens")
        plan = _with_measured_workspace(config, plan, machine, loaded, back_end)
    clock.enter("kv_cache", f"{plan.num_kv_tokens:,} tokens")
    pace = _pace(machine, plan)
    engine = _assemble(config, plan, loaded, back_end, pace=pace, has_independent_rows=has_independent_rows)
    clock.enter("trial", "one token through the whole model")
    try_one_token(engine.executor, engine.builder, path=loaded.path, dtype=plan.dtype)
    _time_steps(config, plan, engine, clock)
    clock.end()
    model = ModelInfo(
        path=loaded.path,
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        vocab_size=loaded.vocab_size,
        hidden_size=loaded.model.hidden_size,
        trained_context=loaded.trained_context,
        max_model_len=plan.max_model_len,
        num_kv_tokens=plan.num_kv_tokens,
        num_kv_blocks=plan.num_blocks,
        num_drafts=plan.num_drafts,
        eos_token_ids=loaded.eos_token_ids,
        generation_defaults=loaded.generation_defaults,
        pooling=loaded.pooling,
        tokenizer=loaded.tokenizer,
        fingerprint=_fingerprint(config, plan, loaded, has_independent_rows),
        settings=plan.settings | {"device.determinism": _determinism(config, has_independent_rows)},
        weights=kept_weights(loaded.model),
        phase_seconds=clock.seconds,
        bytes_per_second=machine.ceilings.bytes_per_second,
        flops_per_second=machine.ceilings.flops_per_second,
    )
    return engine, model


def _time_steps(config: EngineConfig, plan: MemoryPlan, engine: Engine, clock: PhaseClock) -> None:
    """Measures what steps take, if somebody chooses their size by it: drafts that are worth it, or prompts in time."""
    controller, target = engine.speculator.controller, config.scheduler.target_itl_ms
    if controller is None and target is None:
        return
    clock.enter("step_costs", "steps of several sizes")
    num_tokens = (plan.num_blocks // engine.builder.tables.num_groups) * plan.block_size
    by_rows = time_steps(engine.executor, engine.builder, max_rows=min(plan.max_num_logits, num_tokens))
    if controller is not None:
        controller.costs = StepCosts(by_rows)
    if target is None:
        return
    cost = engine.cost
    contexts = ContextCosts.guessed(
        by_rows,
        flops_per_row=cost.flops_per_token + cost.flops_per_logits,
        flops_per_pair=cost.attention_flops_per_pair,
        flops_per_logits=cost.flops_per_logits,
    )
    times = StepTimes(by_rows, contexts)
    max_context = min(num_tokens, plan.max_model_len)
    for work, seconds in time_chunks(engine.executor, engine.builder, max_context=max_context, by_rows=by_rows):
        times.learn(work, seconds)
    engine.scheduler.pacing = PromptPacing(times, target=target / 1000)


def _pace(machine: Machine, plan: MemoryPlan) -> StepPace:
    """What steps reach is remembered for the token budget of later starts."""
    file = ceilings_file(machine, plan.device)
    known = machine.ceilings.step_flops_per_second.get(plan.step_name, 0.0)
    return StepPace(known, lambda rate: file.add(Ceilings(step_flops_per_second={plan.step_name: rate})))


def _load(
    config: EngineConfig, plan: MemoryPlan, back_end: KernelBackend, clock: PhaseClock
) -> tuple[LoadedModel, float, bool]:
    """The model with packed weights, a bound of its keys and values, and whether its rows depend on the row alone."""
    if not plan.can_load:
        logger.warning(
            "loading %s takes %s at its peak, but %s are free: the system may end this process; free some, or set "
            "model.quantization to a format of fewer bits",
            plan.facts.path,
            gib(plan.loading_bytes),
            gib(plan.available_bytes),
        )
    torch.set_num_threads(plan.num_threads)
    if plan.kernels == "numba":  # which pack, too
        _compile(back_end, clock)
    with torch.device(plan.device):
        loaded = load_model(
            plan.model_config,
            dtype=plan.dtype,
            seed=config.seed,
            methods=back_end.linear_methods,
            report=clock.enter,
        )
    loaded.model.show_inputs_of(plan.needs.hidden_layers)
    bound = bound_of_keys_and_values(loaded.model) if plan.kv_dtype == torch.float16 else 0.0
    if plan.kernels != "numba" and back_end.has_compiled_attention(loaded.model):
        _compile(back_end, clock)
    return loaded, bound, back_end.prepare(loaded.model)


def _compile(back_end: KernelBackend, clock: PhaseClock) -> None:
    clock.enter("kernels", "compiled on the first start, read from a cache after that")
    back_end.compile()


def _assemble(
    config: EngineConfig,
    plan: MemoryPlan,
    loaded: LoadedModel,
    back_end: KernelBackend,
    *,
    pace: StepPace,
    has_independent_rows: bool,
) -> Engine:
    model, layers = loaded.model, loaded.model.attention_layers
    num_blocks = plan.num_blocks + 1  # the null block
    codec = make_codec(plan.kv_codec, keys_as_columns=back_end.has_compiled_attention(model))
    cache = KVCache(
        layers,
        num_blocks=num_blocks,
        block_size=plan.block_size,
        codec=codec,
        device=plan.device,
    )
    kv = KVCacheManager(
        num_blocks,
        plan.block_size,
        prefix_caching=config.kv_cache.prefix_caching,
        windows=windows_of(layers),
        cache_key=f"{loaded.weights_digest} {plan.dtype} {codec.name}",
    )
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        max_num_logits=plan.max_num_logits,
        min_prompt_share=MIN_PROMPT_SHARE if plan.kernels == "numba" else None,
        num_lookahead_tokens=plan.needs.num_lookahead_tokens,
    )
    runner = back_end.make_runner(model, cache, has_independent_rows=has_independent_rows)
    overlap = plan.device == "cuda" and plan.num_drafts == 0
    executor = ModelExecutor(runner, back_end.make_sampler(loaded.vocab_size))
    recording = None if config.supervision.record_steps == "off" else StepRecording(config)
    proposer = build_proposer(config.speculation, _proposer_context(config, plan, loaded, runner))
    speculator = Speculator(
        proposer,
        loaded.vocab_size,
        _controller(config, plan, proposer),
        typical=_typical_rule(config),
        grammars=GrammarStates(lambda: _grammar_compiler(loaded)),
    )
    return Engine(
        executor,
        Scheduler(kv, limits),
        speculator,
        _cost(plan),
        pace=pace,
        overlap=overlap,
        recording=recording,
    )


def _grammar_compiler(loaded: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(
        loaded.tokenizer.tokenizer_json, vocab_size=loaded.vocab_size, eos_token_ids=loaded.eos_token_ids
    )


def _typical_rule(config: EngineConfig) -> TypicalRule | None:
    lossy = config.lossy_speculation
    return TypicalRule(lossy.posterior_threshold, lossy.posterior_alpha) if lossy.acceptance == "typical" else None


def _proposer_context(
    config: EngineConfig, plan: MemoryPlan, loaded: LoadedModel, runner: ModelRunner
) -> ProposerContext:
    model = loaded.model
    windows = windows_of(model.attention_layers)
    return ProposerContext(
        target=plan.target,
        full_group=windows.index(None) if None in windows else 0,
        num_blocks=plan.num_blocks + 1,
        output_rows=model.output_rows,
        embedding_rows=model.embedding_rows,
        open_draft_model=lambda: open_draft_model(config, plan, loaded, runner),
        verifies_trees=runner.verifies_trees,
        device=torch.device(plan.device),
        dtype=plan.dtype,
    )


def _cost(plan: MemoryPlan) -> ModelCost:
    """What steps of the model must read and compute; what speculation adds is not counted."""
    facts, experts = plan.facts, plan.facts.experts
    output_size = facts.vocab_size * facts.hidden_size
    num_in_layers = facts.num_linear_parameters - (0 if facts.ties_output else output_size)
    return ModelCost(
        weight_bytes=plan.linear_bytes,
        expert_bytes=plan.expert_bytes,
        expert_share=experts.share,
        flops_per_token=2 * (num_in_layers + int(experts.share * experts.num_parameters)),
        is_queued=plan.device == "cuda",
        flops_per_logits=2 * output_size,
        kv_bytes_per_token=plan.kv_bytes_per_token - plan.draft_kv_bytes_per_token,
        attention_flops_per_pair=sum(4 * layer.num_heads * layer.head_dim for layer in facts.attention_layers),
    )


def _controller(config: EngineConfig, plan: MemoryPlan, proposer: Proposer) -> DraftController | None:
    """Who chooses how many drafts a step verifies; None where a number of them is set, or none are made."""
    if config.speculation.depth != "auto" or not proposer.needs.num_drafts:
        return None
    return DraftController(
        StepCosts(), max_rows=plan.max_num_batched_tokens, depth_costs_time=proposer.needs.depth_costs_time
    )


def _with_measured_workspace(
    config: EngineConfig, plan: MemoryPlan, machine: Machine, loaded: LoadedModel, back_end: KernelBackend
) -> MemoryPlan:
    """The plan, with the memory that the largest step takes here instead of an estimate."""
    sampler = back_end.make_sampler(loaded.vocab_size)
    meter = CudaMemoryMeter()
    num_bytes = measure_workspace(loaded.model, sampler, back_end.make_attention, plan=plan, meter=meter)
    return plan_with_workspace(plan, config, machine, num_bytes)


def _determinism(config: EngineConfig, has_independent_rows: bool) -> Setting:
    """How far a seed's promise holds with this model on this machine."""
    if config.lossy_speculation.acceptance != "exact":
        reason = "typical acceptance is LOSSY: tokens depend on drafts, and these on what else runs"
    elif has_independent_rows:
        reason = "a row's numbers depend on the row alone: not on its batch, its chunk or a warm prefix"
    elif config.device.is_strict:
        reason = "every token goes through the model alone"
    else:
        reason = "the last bits of a row may depend on its batch, so a near tie may fall otherwise; strict prevents it"
    return Setting(config.device.determinism, "config" if config.device.is_strict else "default", reason)


def _numerics_of_device(plan: MemoryPlan) -> list[str]:
    """Whatever of the device and its compilers decides in which order numbers are summed."""
    if plan.device == "cuda":
        parts = [str(torch.cuda.get_device_capability()), str(torch.version.cuda)]
    else:
        parts = [*_processor(), version("numba"), version("llvmlite")]  # attention is compiled under torch's layers too
    if plan.kernels == "triton":
        from kernels.triton.configs import chip_of, table_digest  # which need triton

        parts += [version("triton"), table_digest(chip_of(torch.device(plan.device)))]
    if plan.device == "cpu" and plan.kernels != "numba":
        parts.append(str(plan.num_threads))  # torch cuts sums by threads
    return parts


def _processor() -> list[str]:
    """The instructions that compiled code and torch's libraries choose among, by what each of them knows."""
    import llvmlite.binding as llvm  # on a GPU nothing else loads LLVM

    from kernels.numba.core.processor import features

    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), llvm.get_host_cpu_name(), *sorted(features())]


def _fingerprint(config: EngineConfig, plan: MemoryPlan, loaded: LoadedModel, has_independent_rows: bool) -> str:
    parts = [
        release(),
        torch.__version__,
        loaded.weights_digest,
        plan.quantization,
        plan.model_config.activations,
        plan.kernels,
        config.model.implementation,
        str(plan.dtype),
        plan.kv_codec,
        str(plan.max_model_len),
        str(plan.block_size),
        config.device.determinism,
        str(has_independent_rows),
        *([] if _typical_rule(config) is None else [str(_typical_rule(config)), config.speculation.method]),
        hashlib.sha256(loaded.tokenizer.tokenizer_json.encode()).hexdigest(),
        *_numerics_of_device(plan),
    ]
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
