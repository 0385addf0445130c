"""The measurements inside the engine, on a model of random weights that is tiny."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kernels.numba.core.formats import NAMES
from loadtest.micro import (
    grammar_cost,
    host_step,
    instruction_rates,
    kv_codecs,
    needle,
    perplexity,
    products,
    scaling,
    step_profile,
)
from loadtest.micro.operation_times import ATTENTION, OTHER, WEIGHTS, TorchClock, by_kind, kind_of, merged
from loadtest.micro.steady import PARTS, State, SteadyEngine, StepTimes, build_steady
from loadtest.report.environment import read_environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a config."""
    path = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=300, max_position_embeddings=256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(path)
    return path


@pytest.fixture
def options(model: Path, tmp_path: Path) -> list[str]:
    return ["--model", str(model), "--load-format", "dummy", "--threads", "1", "--results", str(tmp_path)]


@pytest.fixture
def build(options: list[str]) -> Callable[..., SteadyEngine]:
    return lambda *states: build_steady(scaling._parse(options), states)


@pytest.mark.parametrize("state", [State(1, 128), State(5, 64), State(4, 40, num_waiting=30)])
def test_the_timed_steps_do_nothing_but_decode_in_the_state_asked_for(build, state: State) -> None:
    steady = build(State(4, 128), State(state.num_running, state.context))
    steady.engine.scheduler.limits = replace(steady.engine.scheduler.limits, max_num_seqs=state.num_running)
    steady.fill(state, num_steps=10)
    for _ in range(10):
        _, _, stats = steady.engine.step()
        assert (stats.num_tokens, stats.num_running) == (state.num_running, state.num_running)
        assert stats.num_waiting == state.num_waiting
    lengths = {seq.num_tokens for seq in steady.engine.scheduler.running}
    assert min(lengths) == state.context + 1
    assert max(lengths) < state.context + 10
    steady.clear()
    assert not steady.engine.has_work
    assert steady.engine.scheduler.kv.pool.num_owned == 0


def test_steps_with_a_grammar_are_measured_beside_those_without(options: list[str]) -> None:
    arguments = [*options, "--num-seqs", "2", "--steps", "3", "--rounds", "1"]
    rows = grammar_cost.measure(grammar_cost.parse(arguments))
    assert [row["grammar"] for row in rows] == list(grammar_cost.GRAMMARS)
    assert rows[0]["percent of none"] == 100.0
    assert all(float(row["step ms"]) > 0 for row in rows)


def test_a_state_leaves_nothing_to_the_next(build) -> None:
    steady = build(State(4, 64))
    for state in (State(4, 64), State(1, 64), State(4, 64, num_waiting=9)):
        times = steady.measure(state, num_steps=3)
        assert times.whole >= max(times.parts.values()) > 0
        assert sum(times.parts.values()) >= 0.5 * times.whole
        assert not steady.engine.has_work


@pytest.mark.parametrize("state", [State(2, 300), State(9, 64), State(2, 8)])
def test_a_state_that_does_not_fit_says_so(build, state: State) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        build(State(4, 128)).measure(state, num_steps=8)


def test_scaling_writes_what_its_tables_are_made_from(options, tmp_path, capsys) -> None:
    grid = ["--batches", "1,8", "--contexts", "64,200", "--waiting", "0,20", "--steps", "3", "--rounds", "2"]
    assert scaling.main([*options, *grid]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*-scaling.json")
    assert scaling.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out.strip() == printed.split("\n\nwritten")[0].strip()
    tables = [part.splitlines() for part in printed.split("\n\n") if part.startswith("|")]
    keys = [[[cell.strip() for cell in row.split("|")[1:3]] for row in table[2:]] for table in tables]
    assert [row[0] for row in keys[0]] == ["1", "8"]
    assert keys[1] == [["1", "64"], ["1", "200"], ["8", "64"], ["8", "200"]]
    assert keys[2] == [["8", "0"], ["8", "20"]]
    assert "model.quantization" in printed


def test_growth_is_the_steepest_power_between_neighbours() -> None:
    def points(pairs: list[tuple[State, float]]) -> list[scaling.Point]:
        parts = dict.fromkeys((*PARTS, "other"), 0.0)
        return [scaling.Point(state, StepTimes(seconds, parts, 0, 0)) for state, seconds in pairs]

    result = scaling.Scaling(
        read_environment(), {}, 1, 1,
        over_batch=points([(State(1, 9), 1.0), (State(2, 9), 1.0), (State(4, 9), 4.0)]),
        over_context=points([(State(1, 10), 1.0), (State(1, 20), 2.0), (State(8, 10), 5.0), (State(8, 40), 10.0)]),
        over_waiting=points([(State(4, 9, 0), 1.0), (State(4, 9, 10), 3.0), (State(4, 9, 1000), 3.0)]),
    )  # fmt: skip
    expected = {"running": 2.0, "context of one": 1.0, "context of 8": 0.5, "waiting": 0.0}
    assert scaling.growth(result) == pytest.approx(expected)


def test_torch_s_operations_are_timed_per_call_and_never_twice() -> None:
    a = torch.randn(300, 300)
    start = time.perf_counter()
    times = merged(TorchClock().profile(lambda: torch.relu(a @ a), 20))
    seconds = time.perf_counter() - start
    assert {"aten::mm", "aten::matmul", "aten::relu"} <= {operation.name for operation in times}
    assert 0 < sum(operation.seconds for operation in times) < seconds / 20


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", WEIGHTS),
        ("quantized::linear_dynamic_fp16", WEIGHTS),
        ("mkldnn::_linear_pointwise", WEIGHTS),
        ("aten::_weight_int8pack_mm", WEIGHTS),
        ("multiply", WEIGHTS),
        ("aten::bmm", ATTENTION),
        ("aten::_softmax", ATTENTION),
        ("attend", ATTENTION),
        ("rotate_and_store", ATTENTION),
        ("silu_and_multiply", OTHER),
        ("aten::rsqrt", OTHER),
        ("aten::view", None),
        ("aten::linear", None),
        ("aten::empty_strided", None),
    ],
)
def test_an_operation_s_name_says_its_kind(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_no_operation_accounts_for_is_dispatch() -> None:
    operations = merged([("aten::mm", 0.003), ("aten::mm", 0.001), ("aten::view", 0.5), ("aten::bmm", 0.002)])
    assert by_kind(operations) == {WEIGHTS: 0.004, ATTENTION: 0.002, OTHER: 0.0}
    laps = {"schedule": 0.001, "forward": 0.01, "sample": 0.002, "update": 0.003, "propose": 0.0, "other": 0.001}
    parts = step_profile.parts_of(StepTimes(0.017, laps, 0, 0), operations)
    assert parts[step_profile.DISPATCH] == pytest.approx(0.004)
    assert sum(parts.values()) == pytest.approx(0.017)


@pytest.mark.parametrize(("kernels", "more"), [("torch", []), ("numba", ["--no-server"])])
def test_the_profile_of_a_step_reaches_from_the_weights_to_the_client(
    kernels: str, more: list[str], options, tmp_path, capsys
) -> None:
    assert step_profile.main([*options, "--kernels", kernels, "--batches", "1,3", "--steps", "3", *more]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*-step-profile.json")
    assert file.with_suffix(".md").read_text() == printed.split("\nwritten")[0]
    profile = step_profile.load(file)
    assert [batch.num_seqs for batch in profile.batches] == [1, 3]
    for batch in profile.batches:
        assert batch.served is None if more else batch.served > 0
        assert batch.parts[WEIGHTS] > 0 < batch.parts[ATTENTION]
        assert sum(batch.parts.values()) >= 0.5 * batch.step
        assert 0 < batch.floor.kv < batch.floor.seconds
    assert profile.batches[1].floor.kv == pytest.approx(3 * profile.batches[0].floor.kv, rel=0.05)
    for words in ("## Batch 3", "| weights ", "times its floor"):
        assert words in printed
    assert (step_profile.WAY_TO_CLIENT in printed) == (not more)


@pytest.mark.parametrize("kind", NAMES)
def test_every_kind_of_product_has_an_instruction_whose_rate_can_be_measured(kind: int, monkeypatch) -> None:
    for name, few in (("NUM_RUNS", 2), ("NUM_ITERATIONS", 1000)):
        monkeypatch.setattr(instruction_rates, name, few)
    name = instruction_rates.instruction_of(kind)
    assert instruction_rates.rate(name, 3) > instruction_rates.rate(name, 1) / 3 > 0


def test_products_are_timed_by_kind_and_rows(monkeypatch, capsys) -> None:
    monkeypatch.setattr(products, "STREAMED_BYTES", 1)
    assert products.main(["--rows", "1,3", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * len(products.KINDS)
    with pytest.raises(SystemExit):
        products.main(["--kinds", "int5"])
    assert "no kind of product is called int5" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    for load in (scaling.load, step_profile.load):
        with pytest.raises(ValueError, match="no result"):
            load(file)


@pytest.mark.parametrize("has_drafts", [False, True])
def test_the_host_s_part_of_a_gpu_s_step_is_measured_without_one(
    monkeypatch: pytest.MonkeyPatch, *, has_drafts: bool
) -> None:
    monkeypatch.setattr(host_step, "NUM_ROUNDS", 2)
    monkeypatch.setattr(host_step, "NUM_STEPS", 3)
    row = host_step.measure(3, 40, has_drafts=has_drafts)
    assert (row["step"], row["seqs"], row["context"]) == ("3 drafts" if has_drafts else "decode", 3, 40)
    parts = [row[f"{part} us"] for part in PARTS]
    assert min(parts) > 0
    assert row["whole us"] > max(parts)


def test_settings_that_round_are_compared_by_perplexity(model: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    exact, narrow = "model.load_format=dummy,model.dtype=float32", "model.load_format=dummy,model.quantization=int4"
    arguments = ["--model", str(model), "--text", str(text), "--tokens", "80"]
    perplexity.main([*arguments, exact, exact.replace("model.dtype", "device.num_threads=1,model.dtype"), narrow])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["settings", "text", "text,", "%", "largest", "mean"]
    first, same, rounded = ([float(cell) for cell in row.split()[1:]] for row in rows)
    assert first[0] > 100  # random weights know nothing
    assert same == first == [first[0], 0, 0, 0]
    assert rounded[2] > rounded[3] > 0


def test_a_needle_is_asked_for_at_every_depth_with_each_setting(model: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. ")
    settings = ["model.load_format=dummy,kv_cache.dtype=float16", "model.load_format=dummy,kv_cache.dtype=int8"]
    needle.main(["--model", str(model), "--text", str(text), "--context", "100", *settings])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["settings", "depth", "tokens", "is", "answer", "found", "log-probability"]
    assert [row.split()[:4] for row in rows] == [
        [setting, f"{depth:.0%}", "100", code.strip()]
        for setting in settings
        for depth, code in zip(needle.DEPTHS, needle.CODES, strict=True)
    ]
    scores = [float(row.split()[-1]) for row in rows]
    assert max(scores) < -1  # random weights know nothing
    assert scores[:5] != scores[5:] == pytest.approx(scores[:5], abs=0.1)


def test_codecs_of_a_cache_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_codecs, "NUM_LAYERS", 2)
    row = kv_codecs.measure(2, 1, 32, ["float16", "int8"], num_rounds=2, num_threads=1)
    assert (row["seqs"], row["new"], row["context"]) == (2, 1, 32)
    assert min(row["float16, us"], row["int8, us"]) > 0
    assert float(row["int8 / float16"]) > 0
