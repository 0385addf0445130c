"""What fits beside a model, at the limit and one past it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TypeAlias

import pytest
import torch

from engine.config import EngineConfig
from engine.kv_cache.layer_spec import AttentionLayer, group_layers, windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.loading.loading_peak import OTHER_BYTES, Matrix
from engine.loading.model_facts import ModelFacts
from engine.planning.engine_plan import MemoryPlan, PlanError, plan_memory, render_plan
from engine.planning.machine import Ceilings, Gpu, Machine
from engine.planning.resolve import CacheSize, SettingError, parse_cache_size
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler

Section: TypeAlias = dict[str, str | int]

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
KV_BYTES = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 4  # of a float32 token
READ_BYTES = 2 * KV_BYTES // NUM_LAYERS  # to lay out one layer's context

FACTS = ModelFacts(
    path="some/model",
    architecture="LlamaForCausalLM",
    num_parameters=1_500_000,
    num_linear_parameters=1_000_000,
    num_embedding_parameters=499_000,
    ties_output=True,
    attention_layers=tuple(AttentionLayer(i, 4, NUM_KV_HEADS, HEAD_DIM, 0.125) for i in range(NUM_LAYERS)),
    vocab_size=1000,
    hidden_size=256,
    widest=1024,
    trained_context=2048,
    why_not_compiled="layers of another kind",
)
COMPILED = replace(FACTS, why_not_compiled="")


def make_machine(
    available: int = 2**30,
    *,
    total: int = 2**32,
    device: str = "cpu",
    has_fast_bf16: bool = False,
    has_float16_weights: bool = False,
) -> Machine:
    return Machine(
        device=device,
        cpu_name="a CPU",
        num_cores=8,
        num_threads=6,
        total_bytes=total,
        available_bytes=available,
        has_fast_bf16=has_fast_bf16,
        has_avx512=False,
        has_float16_weights=has_float16_weights,
    )


def plan(machine: Machine, facts: ModelFacts = FACTS, **sections: Section) -> MemoryPlan:
    return plan_memory(facts, EngineConfig.model_validate(sections), machine)


def fixed_bytes(**sections: Section) -> int:
    """What is needed before the cache."""
    ample = plan(make_machine(), **sections)
    return ample.weight_bytes + ample.workspace_bytes


def test_weights_are_counted_as_they_will_lie_in_memory() -> None:
    with_output = 1_000_000 + 499_000  # a packed output layer is a copy of the embedding
    expected = {
        ("float32", "none"): (4 * with_output, 4 * 500_000),
        ("bfloat16", "none"): (2 * with_output, 2 * 500_000),
        ("float32", "int8"): (int(1.0625 * with_output), 4 * 500_000),  # a scale for each 32 weights
        ("float32", "fp16"): (2 * with_output, 4 * 500_000),
    }
    for (dtype, quantization), (linear, embedding) in expected.items():
        made = plan(make_machine(), model={"dtype": dtype, "quantization": quantization})
        assert (made.linear_bytes, made.embedding_bytes) == (linear, embedding)
        assert made.weight_bytes == linear + embedding
    on_gpu = plan(make_machine(2**32, device="cuda"))
    assert on_gpu.linear_bytes == 2 * 1_000_000  # bfloat16, and the output shares
    untied = plan(make_machine(), facts=replace(FACTS, ties_output=False))
    assert untied.linear_bytes == 4 * 1_000_000


def test_a_token_takes_its_keys_and_values_in_every_layer() -> None:
    assert plan(make_machine()).kv_bytes_per_token == KV_BYTES
    assert plan(make_machine(), kv_cache={"dtype": "bfloat16"}).kv_bytes_per_token == KV_BYTES // 2
    assert plan(make_machine(), model={"dtype": "bfloat16"}).kv_bytes_per_token == KV_BYTES // 2


def test_8_bits_double_the_tokens_that_fit() -> None:
    layers = tuple(AttentionLayer(i, 8, 2, 128, 0.1) for i in range(4))
    facts = replace(FACTS, attention_layers=layers)

    def make(dtype: str) -> MemoryPlan:
        machine = make_machine(2**34, device="cuda")
        return plan(machine, facts, kv_cache={"dtype": dtype, "memory": "1GiB"})

    narrow, wide = make("int8"), make("bfloat16")
    assert (narrow.kv_bytes_per_token, wide.kv_bytes_per_token) == (4 * 2 * 2 * (128 + 4), 4 * 2 * 2 * 128 * 2)
    assert 1.93 < narrow.num_kv_tokens / wide.num_kv_tokens < 1.94
    assert f"{narrow.num_kv_tokens:,} in" in render_plan(narrow)
    assert narrow.kv_dtype == torch.int8
    assert make("fp8_e4m3").settings["kv_cache.dtype"].value == make("fp8").kv_codec == "fp8"


def test_8_bits_are_refused_where_nothing_reads_them() -> None:
    odd = replace(FACTS, attention_layers=(AttentionLayer(0, 2, 2, 18, 0.1),))
    with pytest.raises(SettingError, match="heads of a multiple of 4 elements have; this model's have 18"):
        plan(make_machine(), odd, kv_cache={"dtype": "int8"})
    machine = make_machine(2**34, device="cuda")
    ampere = replace(machine, gpu=Gpu("NVIDIA A100", 2**34, 2**34, (8, 0)))
    assert plan(ampere, kv_cache={"dtype": "int8"}).kv_codec == "int8"
    with pytest.raises(SettingError, match=r"NVIDIA A100 has no 8-bit floats .* set it to int8"):
        plan(ampere, kv_cache={"dtype": "fp8"})
    ada = replace(machine, gpu=Gpu("NVIDIA L4", 2**34, 2**34, (8, 9)))
    assert plan(ada, kv_cache={"dtype": "fp8"}).kv_codec == "fp8"


def test_auto_holds_the_longest_sequence_and_a_chat_for_each_request() -> None:
    made = plan(make_machine())
    assert made.num_kv_tokens == 32 * 384
    assert made.max_model_len == 2048
    assert made.num_full_sequences == 6
    few = plan(make_machine(), scheduler={"max_num_seqs": 2})
    assert few.num_kv_tokens == 2048
    drafting = plan(make_machine(), scheduler={"max_num_seqs": 2}, speculation={"method": "ngram", "num_drafts": 4})
    assert drafting.num_kv_tokens == 2048 + 16
    assert drafting.num_drafts == 4


@pytest.mark.parametrize("windows", [(None,) * 4, (100,) * 4, (100, 100, None, 100)])
def test_a_sequence_takes_what_its_windows_see_and_the_scheduler_agrees(windows: tuple[int | None, ...]) -> None:
    """A window holds 100 tokens, a step of 64 and a block at each end. One sequence just fits."""
    pairs = zip(FACTS.attention_layers, windows, strict=True)
    layers = group_layers([replace(layer, window=window) for layer, window in pairs])
    facts = replace(FACTS, attention_layers=tuple(layers))
    limits: Section = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
    of_window, of_text = -(-(100 + 64 + 2 * 16) // 16), 2048 // 16
    blocks = [of_text if window is None else of_window for window in windows_of(layers)]
    made = plan(make_machine(), facts=facts, scheduler=limits)
    assert (made.blocks_per_sequence, made.kv_bytes_per_token) == (sum(blocks), KV_BYTES)
    assert made.kv_bytes == made.num_kv_tokens * KV_BYTES
    num_tokens = -(-sum(blocks) // len(blocks)) * 16

    def built(num_tokens: int) -> Scheduler:
        tight = plan(make_machine(), facts=facts, scheduler=limits, kv_cache={"memory": f"{num_tokens}tokens"})
        kv = KVCacheManager(tight.num_blocks + 1, 16, windows=tight.windows)
        sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
        return Scheduler(kv, SchedulerLimits(max_model_len=tight.max_model_len, **sizes))

    assert built(num_tokens).limits.max_model_len == 2048
    assert built(num_tokens - 16).limits.max_model_len < 2048
    assert ("of 4 groups" in render_plan(made)) == (len(blocks) > 1)


def test_auto_length_gives_way_to_memory_and_says_so() -> None:
    free = 2 * 1000 * (KV_BYTES + READ_BYTES)  # half of it is for the cache
    made = plan(make_machine(fixed_bytes() + free))
    assert made.num_kv_tokens == 992  # whole blocks of 16
    assert made.max_model_len == 992
    setting = made.settings["model.max_model_len"]
    assert (setting.value, setting.source) == (992, "measured")
    assert "trained for 2048" in setting.reason
    assert made.model_config.max_model_len == 992


@pytest.mark.parametrize("num_drafts", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_one_sequence_fits_exactly_and_one_token_more_does_not(num_drafts: int, block_size: int) -> None:
    method: Section = {"method": "none"} if num_drafts == 0 else {"method": "ngram", "num_drafts": num_drafts}
    cache: Section = {"memory": "1024tokens", "block_size": block_size}
    fits = 1024 - num_drafts
    made = plan(make_machine(), model={"max_model_len": fits}, kv_cache=cache, speculation=method)
    assert made.max_model_len == fits
    assert made.num_full_sequences == 1
    with pytest.raises(PlanError, match=f"set model.max_model_len to {fits} or less") as refused:
        plan(make_machine(), model={"max_model_len": fits + 1}, kv_cache=cache, speculation=method)
    assert refused.value.kind == "memory"
    assert plan(make_machine(), kv_cache=cache, speculation=method).max_model_len == fits


def test_the_help_that_an_error_offers_helps() -> None:
    rng = random.Random(0)
    for _ in range(200):
        cache: Section = {"memory": f"{rng.randrange(16, 3000)}tokens", "block_size": rng.choice([1, 8, 16, 32])}
        wanted = rng.randrange(1, 2049)
        machine = make_machine(fixed_bytes() + rng.randrange(2**22, 2**24))
        try:
            made = plan(machine, model={"max_model_len": wanted}, kv_cache=cache)
        except PlanError as error:
            help_text = str(error).rpartition("set ")[2]
            if "kv_cache.memory" in str(error).partition(":")[0]:
                cache["memory"] = help_text.split('"')[1]
                made = plan(machine, kv_cache=cache)
            else:
                made = plan(machine, model={"max_model_len": int(help_text.split()[2])}, kv_cache=cache)
        needed = made.weight_bytes + made.workspace_bytes + made.num_kv_tokens * (KV_BYTES + READ_BYTES)
        assert needed <= machine.available_bytes
        assert made.num_full_sequences >= 1


def test_bytes_and_tokens_are_taken_at_their_word() -> None:
    assert plan(make_machine(), kv_cache={"memory": "1000tokens"}).num_kv_tokens == 992
    made = plan(make_machine(), kv_cache={"memory": "8MiB"})
    assert made.num_kv_tokens == 8 * 2**20 // KV_BYTES // 16 * 16
    assert made.settings["kv_cache.memory"].source == "config"
    machine = make_machine(fixed_bytes() + 1600 * (KV_BYTES + READ_BYTES))
    assert plan(machine, kv_cache={"memory": "1600tokens"}).num_kv_tokens == 1600
    with pytest.raises(PlanError, match='set it to "1600tokens" or less'):
        plan(machine, kv_cache={"memory": "1601tokens"})


def test_a_fraction_counts_the_weights_in() -> None:
    made = plan(make_machine(2**32), kv_cache={"memory": "0.5"})
    used = made.weight_bytes + made.workspace_bytes + made.num_kv_tokens * (KV_BYTES + READ_BYTES)
    assert 2**31 - 16 * (KV_BYTES + READ_BYTES) < used <= 2**31
    with pytest.raises(PlanError, match=r"kv_cache\.memory is 0\.001 of 4\.00 GiB"):
        plan(make_machine(2**32), kv_cache={"memory": "0.001"})
    on_gpu = plan(make_machine(2**32, device="cuda"))
    assert on_gpu.settings["kv_cache.memory"].reason.startswith("0.9 of 4.00 GiB")


def test_a_model_too_large_is_refused_with_what_would_make_it_fit() -> None:
    large = replace(FACTS, num_linear_parameters=10**9, num_parameters=10**9 + 500_000)
    with pytest.raises(PlanError, match=r"needs 3\.7. GiB.*set model\.quantization to int8"):
        plan(make_machine(2 * 2**30), facts=large)
    assert plan(make_machine(2 * 2**30), facts=large, model={"quantization": "int8"}).num_blocks > 0
    with pytest.raises(PlanError, match=r"needs 1\.8. GiB.*set model\.quantization to int8"):
        plan(make_machine(3 * 2**29, has_float16_weights=True), facts=large)
    with pytest.raises(PlanError, match="smaller model"):
        plan(make_machine(2**29), facts=large, model={"quantization": "int8"})
    with pytest.raises(PlanError, match="smaller model"):
        plan(make_machine(2**29), facts=large)


def test_what_the_machine_decides_has_a_source_and_a_reason() -> None:
    slow, fast = plan(make_machine()), plan(make_machine(has_fast_bf16=True))
    assert (slow.dtype, fast.dtype) == (torch.float32, torch.bfloat16)
    assert (slow.kv_dtype, fast.kv_dtype) == (torch.float32, torch.bfloat16)
    assert (slow.num_threads, slow.device) == (6, "cpu")
    for key, setting in slow.settings.items():
        assert setting.source in ("measured", "model", "default"), key
        assert setting.reason, key
    asked = plan(
        make_machine(has_fast_bf16=True),
        model={"dtype": "float16", "quantization": "none", "max_model_len": 100},
        device={"name": "cpu", "kernels": "torch", "num_threads": 2},
        scheduler={"max_num_seqs": 3, "max_num_batched_tokens": 77},
        kv_cache={"memory": "1600tokens", "dtype": "float32"},
    )
    assert {setting.source for setting in asked.settings.values()} == {"config"}
    assert [setting.value for setting in asked.settings.values()] == [
        "cpu", "torch", 2, "float16", "none", 100, 3, 77, "1600tokens", "float32",
    ]  # fmt: skip
    assert (asked.model_config.dtype, asked.model_config.max_model_len) == ("float16", 100)


@pytest.mark.parametrize("has_float16_weights", [True, False])
@pytest.mark.parametrize("has_fast_bf16", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["auto", "none", "fp16", "int8"])
def test_half_weights_are_chosen_only_where_nobody_asked_for_exact_ones_and_they_gain(
    quantization: str, dtype: str, device: str, has_fast_bf16: bool, has_float16_weights: bool
) -> None:
    machine = make_machine(2**32, device=device, has_fast_bf16=has_fast_bf16, has_float16_weights=has_float16_weights)
    made = plan(machine, model={"dtype": dtype, "quantization": quantization})
    gains = device == "cpu" and has_float16_weights and not has_fast_bf16
    by_itself = "fp16" if gains and dtype == "auto" else "none"
    assert made.quantization == (by_itself if quantization == "auto" else quantization)
    assert made.model_config.quantization == made.quantization
    setting = made.settings["model.quantization"]
    assert setting.value == made.quantization
    assert (setting.source == "config") == (quantization != "auto")
    assert setting.reason or quantization != "auto"
    if by_itself == "fp16":
        assert made.dtype == torch.float32


@pytest.mark.parametrize("has_float16_weights", [True, False])
@pytest.mark.parametrize("has_fast_bf16", [True, False])
def test_compiled_layers_are_planned_for_alike_on_every_cpu(has_fast_bf16: bool, has_float16_weights: bool) -> None:
    machine = make_machine(has_fast_bf16=has_fast_bf16, has_float16_weights=has_float16_weights)
    made = plan(machine, facts=COMPILED)
    assert (made.kernels, made.dtype, made.quantization, made.kv_dtype) == (
        "numba", torch.float32, "fp16", torch.float16,
    )  # fmt: skip
    assert made.kv_bytes_per_token == KV_BYTES // 2
    assert all(setting.source != "config" and setting.reason for setting in made.settings.values())
    with_output = 1_000_000 + 499_000
    sizes = {"none": 4, "fp16": 2, "int8": 1.0625}  # bytes of a weight, at most; the rest is float32
    for quantization, size in sizes.items():
        made = plan(machine, facts=COMPILED, model={"quantization": quantization})
        assert (made.linear_bytes, made.embedding_bytes) == (int(size * with_output), 4 * 500_000)


def test_a_bfloat16_checkpoint_is_computed_in_bfloat16_where_the_cpu_multiplies_that() -> None:
    facts, fast = replace(COMPILED, is_bfloat16=True), make_machine(has_fast_bf16=True)

    def dtype(machine: Machine = fast, facts: ModelFacts = facts, **sections: Section) -> str:
        made = plan(machine, facts=facts, **sections)
        assert made.kernels == "numba"
        assert made.settings["kv_cache.dtype"].value == "float16"
        assert made.settings["model.dtype"].value == str(made.dtype).removeprefix("torch.")
        return made.settings["model.dtype"].value

    assert dtype() == dtype(device={"cpu_features": "avx512-bf16"}) == "bfloat16"
    assert "perplexity" in plan(fast, facts=facts).settings["model.dtype"].reason
    assert plan(fast, facts=facts).linear_bytes == plan(fast, facts=COMPILED).linear_bytes
    assert plan(fast, facts=facts).step_name != plan(fast, facts=COMPILED).step_name
    assert dtype(make_machine()) == dtype(facts=COMPILED) == "float32"
    for level in ("avx2", "avx512", "avx512-vnni"):
        assert dtype(device={"cpu_features": level}) == "float32"
    for quantization, expected in {
        "none": "bfloat16",
        "fp16": "bfloat16",
        "int8": "float32",
        "int4": "float32",
    }.items():
        assert dtype(model={"quantization": quantization}) == expected


def test_an_int4_model_keeps_its_output_layer_in_int8() -> None:
    tied = plan(make_machine(), facts=COMPILED, model={"quantization": "int4"})
    assert tied.linear_bytes == int(0.625 * 1_000_000 + 1.0625 * 499_000)
    facts = replace(COMPILED, ties_output=False)  # of the million, 256,000 are the output layer's
    assert plan(make_machine(), facts=facts, model={"quantization": "int4"}).linear_bytes == int(
        0.625 * 744_000 + 1.0625 * 256_000
    )


def test_a_plan_says_what_loading_takes_and_whether_it_is_free() -> None:
    output = Matrix(499_000, is_output=True, is_shared=True)
    facts = replace(COMPILED, matrices=(*[Matrix(10_000)] * 100, output._replace(num_weights=10_000)))
    made = plan(replace(make_machine(), process_bytes=2**28), facts=facts, model={"quantization": "int4"})
    largest = 4 * facts.num_embedding_parameters  # a matrix is floats until it is packed; the model never is
    assert made.loading_bytes == made.weight_bytes + largest + OTHER_BYTES
    assert made.can_load
    assert "peak while loading" in render_plan(made)
    assert "MORE THAN IS FREE" not in render_plan(made)
    short = replace(made, available_bytes=made.loading_bytes - 1)
    assert not short.can_load
    assert "MORE THAN IS FREE" in render_plan(short)
    halves = plan(make_machine(), facts=facts, model={"quantization": "int4", "dtype": "bfloat16"})
    assert halves.loading_bytes < made.loading_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_who_names_a_dtype_gets_the_model_s_own_weights_and_a_cache_of_as_many_bits(dtype: str) -> None:
    made = plan(make_machine(), facts=COMPILED, model={"dtype": dtype})
    narrow = torch.float16  # what bfloat16 takes too, in whose place it is eight times as fine
    assert (made.kernels, made.quantization) == ("numba", "none")
    assert made.kv_dtype == (torch.float32 if dtype == "float32" else narrow)
    other = plan(make_machine(), facts=COMPILED, model={"dtype": dtype}, kv_cache={"dtype": "bfloat16"})
    assert other.kv_dtype == torch.bfloat16


def test_compiled_layers_run_on_every_cpu() -> None:
    fast = make_machine(has_fast_bf16=True)  # AMX or not
    assert plan(make_machine(), facts=COMPILED).kernels == "numba"
    assert plan(make_machine(), facts=COMPILED, device={"kernels": "torch"}).kernels == "torch"
    assert plan(make_machine(2**32, device="cuda"), facts=COMPILED).kernels == "triton"
    for dtype in ("auto", "float32", "bfloat16"):
        assert plan(fast, facts=COMPILED, model={"dtype": dtype}).kernels == "numba"
    assert plan(fast).kernels == "torch"
    with pytest.raises(SettingError, match="numba, which cannot run a GPU"):
        plan(make_machine(2**32, device="cuda"), facts=COMPILED, device={"kernels": "numba"})


@pytest.mark.parametrize("block_size", [1, 8, 24])
def test_blocks_that_compiled_layers_cannot_use_are_refused_instead_of_serving_slowly(block_size: int) -> None:
    cache: Section = {"block_size": block_size}
    for kernels in ("auto", "numba"):
        with pytest.raises(SettingError, match=rf"block_size is {block_size}, .* multiples of 16; set it to (16|32)"):
            plan(make_machine(), facts=COMPILED, kv_cache=cache, device={"kernels": kernels})
    assert plan(make_machine(), facts=COMPILED, kv_cache=cache, device={"kernels": "torch"}).kernels == "torch"
    assert plan(make_machine(), kv_cache=cache).kernels == "torch"  # no compiled layers, and nothing to lose


def test_half_weights_take_half_the_bytes_of_linear_layers() -> None:
    exact = plan(make_machine(has_float16_weights=True), model={"quantization": "none"})
    half = plan(make_machine(has_float16_weights=True))
    assert (half.linear_bytes, half.embedding_bytes) == (exact.linear_bytes // 2, exact.embedding_bytes)


def test_the_token_budget_of_a_cpu_is_an_eighth_of_a_second_at_the_pace_that_is_known() -> None:
    facts = replace(FACTS, num_linear_parameters=100_000_000, num_parameters=100_500_000)
    name = plan(make_machine(2**33), facts=facts).step_name

    def budget(flops: float, learned: float = 0.0, **device: str | int) -> tuple[int, str]:
        ceilings = Ceilings(1e9, flops, {name: learned} if learned else {})
        made = plan(replace(make_machine(2**33), ceilings=ceilings), facts=facts, device=device)
        return made.max_num_batched_tokens, made.settings["scheduler.max_num_batched_tokens"].reason

    for rate in (1e9, 1e11, 3e11, 5e11, 1e12, 1e15):
        expected = min(512, max(64, int(rate / 8 / 200_000_000) // 16 * 16))
        assert budget(1.0, rate)[0] == expected
        assert "steps of this model reach" in budget(1.0, rate)[1]
        assert budget(rate / 0.8 * 1.0001)[0] == expected
        assert "until steps of this model have told" in budget(rate)[1]
    assert budget(1e12, num_threads=3)[0] == budget(5e11)[0]  # half of the machine's six
    assert "not asked" in budget(0.0)[1]


def test_a_step_has_as_many_rows_of_logits_as_memory_was_planned_for() -> None:
    rng = random.Random(0)
    for _ in range(100):
        seqs = rng.randrange(1, 300)
        tokens = seqs + rng.choice([0, 1, 100, 8000])
        drafts = rng.choice([0, 1, 4])
        speculation: Section = {"method": "ngram", "num_drafts": drafts} if drafts else {"method": "none"}
        scheduler: Section = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens}
        made = plan(make_machine(2**34), scheduler=scheduler, speculation=speculation)
        sampled = min(seqs * (1 + drafts), tokens)  # nobody waits for another's scores
        assert made.max_num_logits == min(sampled + 256, tokens) >= seqs
        assert made.workspace_bytes >= made.max_num_logits * FACTS.vocab_size * 4 * 2
        assert f"{made.max_num_logits:,} rows of logits" in render_plan(made)


def test_one_limit_set_moves_the_other() -> None:
    many = plan(make_machine(), scheduler={"max_num_seqs": 1000})
    assert (many.max_num_seqs, many.max_num_batched_tokens) == (1000, 1000)
    small = plan(make_machine(), scheduler={"max_num_batched_tokens": 8})
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (8, 8)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"max_model_len": 2049}}, "set it to 2048 or less"),
        ({"device": {"name": "cuda"}}, "no GPU"),
        ({"model": {"quantization": "int3"}}, "supported with torch kernels are auto, none, fp16, int8"),
        ({"model": {"quantization": "int4"}}, "supported with torch kernels are auto, none, fp16, int8"),
        ({"device": {"kernels": "numba"}}, "cannot run layers of another kind; set it to"),
        ({"kv_cache": {"dtype": "fp4"}}, "supported are auto, float32"),
        ({"kv_cache": {"dtype": "fp8"}}, "Triton's kernels read, but device.kernels is torch here; set it to int8"),
        ({"kv_cache": {"dtype": "fp8_e4m3"}}, "only Triton's kernels read"),
        ({"kv_cache": {"memory": "lots"}}, "kv_cache.memory"),
        ({"scheduler": {"max_num_seqs": 10, "max_num_batched_tokens": 9}}, "raise the first or lower the second"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(sections: dict[str, Section], reason: str) -> None:
    with pytest.raises(SettingError, match=reason) as refused:
        plan(make_machine(), **sections)
    assert refused.value.kind == "config"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", CacheSize()),
        ("0.9", CacheSize(fraction=0.9)),
        ("1", CacheSize(fraction=1.0)),
        ("2GiB", CacheSize(num_bytes=2 * 2**30)),
        ("1.5 GB", CacheSize(num_bytes=1_500_000_000)),
        ("100000tokens", CacheSize(num_tokens=100_000)),
        (" 64 tokens", CacheSize(num_tokens=64)),
    ],
)
def test_cache_sizes_are_read(text: str, size: CacheSize) -> None:
    assert parse_cache_size(text) == size


@pytest.mark.parametrize("text", ["", "1.1", "0", "-1", "-0.5", "2 gib", "tokens", "2GiB3", "nan", "1e9", "0tokens"])
def test_what_is_no_cache_size_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"kv_cache\.memory"):
        parse_cache_size(text)


def test_the_table_shows_every_number_that_matters() -> None:
    made = plan(make_machine())
    table = render_plan(made)
    for value in ("some/model", "12,288 in 768 blocks of 16", "6 of 2,048 tokens", f"{KV_BYTES:,} bytes per token"):
        assert value in table
    for key, setting in made.settings.items():
        assert any(line.startswith(key) and str(setting.value) in line for line in table.splitlines())


def test_graphs_have_memory_of_their_own_on_a_gpu() -> None:
    made = plan(make_machine(2**32, device="cuda"))
    assert made.graphs.total > made.graphs.attention > 0
    assert "CUDA graphs" in render_plan(made)
    taken = made.weight_bytes + made.workspace_bytes + made.graphs.total
    kv_bytes = KV_BYTES // 2  # bfloat16; Triton reads the cache where it lies
    assert made.num_kv_tokens == (int(0.9 * 2**32) - taken) // kv_bytes // 16 * 16
    drafting = plan(make_machine(2**32, device="cuda"), speculation={"method": "ngram", "num_drafts": 4})
    assert drafting.graphs.attention == 5 * made.graphs.attention
    for other in (plan(make_machine()), plan(make_machine(2**32, device="cuda"), device={"kernels": "torch"})):
        assert other.graphs.total == 0
        assert "CUDA graphs" not in render_plan(other)


def test_only_attention_that_gathers_the_cache_needs_memory_to_read_it() -> None:
    same: Section = {"dtype": "float32", "quantization": "none"}
    tokens = {}
    for kernels in ("torch", "numba"):
        made = plan(make_machine(2**26), COMPILED, model=same, device={"kernels": kernels}, kv_cache={"memory": "0.01"})
        tokens[kernels] = made.num_kv_tokens
        left = int(0.01 * 2**32) - made.weight_bytes - made.workspace_bytes
        per_token = KV_BYTES + (-(-2 * KV_BYTES // NUM_LAYERS) if kernels == "torch" else 0)
        assert made.num_kv_tokens == left // per_token // 16 * 16
    assert tokens["numba"] > tokens["torch"]
