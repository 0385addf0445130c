"""How fast a machine is at best: noise of other programs never counts, and nothing that was seen is forgotten."""

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.planning.ceilings import CeilingsFile, best_rate, ceilings_file, measure_ceilings, with_ceilings
from engine.planning.machine import Ceilings, read_machine
from engine.scheduling.step_stats import NUM_WITNESSES, StepPace
from engine.types import Request, SamplingParams, StepStats


def test_ceilings_are_measured_quickly_and_leave_the_threads_alone() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    bytes_per_second, flops_per_second = measure_ceilings(2)
    assert time.perf_counter() - start < 5
    assert 1e8 < bytes_per_second < 1e13
    assert 1e8 < flops_per_second < 1e15
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("num_threads", [1, 3])
def test_interruptions_never_raise_a_rate_and_one_quiet_stretch_is_enough(num_threads: int) -> None:
    rng = random.Random(num_threads)
    for _ in range(100):
        quiet = [0.001 * i for i in range(400)]
        delays = [rng.choice([0.0, 0.0, 0.0, rng.random() / 50]) for _ in quiet]
        first = rng.randrange(200)
        for place in range(first, first + 160):
            delays[place] = 0.0
        late, ends = 0.0, []
        for end, delay in zip(quiet, delays, strict=True):
            late += delay
            ends.append(end + late)
        assert best_rate(ends, num_threads) == pytest.approx(best_rate(quiet, num_threads))
        everywhere = [2 * end + rng.random() / 1e6 for end in quiet]
        assert best_rate(everywhere, num_threads) < 0.51 * best_rate(quiet, num_threads)
    assert best_rate(quiet[:5], num_threads) == 0.0  # too short to tell


def test_the_best_of_all_starts_is_kept(tmp_path: Path) -> None:
    file, rng = CeilingsFile(tmp_path / "deep" / "file.json"), random.Random(0)
    assert file.read() == Ceilings()
    seen = [
        Ceilings(rng.random() * 1e11, rng.random() * 1e12, {rng.choice("ab"): rng.random() * 1e12}) for _ in range(30)
    ]
    for ceilings in seen:
        best = file.add(ceilings)
        assert file.read() == best
        assert best.best_of(ceilings) == best
    assert best.bytes_per_second == max(one.bytes_per_second for one in seen)
    assert best.flops_per_second == max(one.flops_per_second for one in seen)
    for key in "ab":
        assert best.step_flops_per_second[key] == max(one.step_flops_per_second.get(key, 0.0) for one in seen)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"bytes_per_second":"x"}', b'{"bytes_per_second":-1}', b'{"flops_per_second":1e300}',
     b'{"step_flops_per_second":{"a":-5}}', b'{"step_flops_per_second":3}'],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_written_anew(tmp_path: Path, content: bytes) -> None:
    file = CeilingsFile(tmp_path / "file.json")
    file.path.write_bytes(content)
    assert file.read() == Ceilings()
    assert file.add(Ceilings(5.0, 6.0)) == file.read() == Ceilings(5.0, 6.0)


def test_where_nothing_can_be_written_what_was_measured_counts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # root may write anywhere, but into no file
    assert CeilingsFile(tmp_path / "file" / "file.json").add(Ceilings(5.0, 6.0)) == Ceilings(5.0, 6.0)


def test_each_machine_and_device_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path))
    machine = read_machine()
    others = [
        replace(machine, cpu_name="another"),
        replace(machine, num_threads=99),
        replace(machine, num_cores=99),
    ]
    paths = {ceilings_file(one, device).path for one in [machine, *others] for device in ("cpu", "cuda")}
    assert len(paths) == 8
    assert ceilings_file(replace(machine, available_bytes=1), "cpu") == ceilings_file(machine, "cpu")
    fast = Ceilings(1e15, 1e17)
    ceilings_file(machine, "cpu").add(fast)
    assert with_ceilings(machine, "cpu").ceilings == fast  # this second was no better


def a_step(num_tokens: int, flops: float, seconds: float) -> StepStats:
    names = ["num_seqs", "num_running", "num_waiting", "num_blocks", "num_owned_blocks", "num_cached_blocks"]
    names += ["num_preemptions", "num_prefix_queries", "num_prefix_hits", "num_drafts", "num_draft_tokens"]
    times = dict.fromkeys(["schedule", "sample", "update", "propose"], 0.5)
    return StepStats(
        num_tokens=num_tokens,
        flops=int(flops),
        forward=seconds,
        bytes_moved=1,
        accepted_by_position=[],
        **dict.fromkeys(names, 0),
        **times,
    )


def test_a_pace_is_what_several_steps_have_reached_and_no_second_lowers_it() -> None:
    rng = random.Random(0)
    for _ in range(50):
        saved: list[float] = []
        known = rng.choice([0.0, 5e9])
        pace = StepPace(known, saved.append)
        rates = [rng.choice([1e9, 1e10, 1e11]) * rng.random() for _ in range(40)]
        rates[rng.randrange(40)] = 1e15  # an odd reading of the clock
        for rate in rates:
            before = pace.known
            pace.learn(a_step(64, rate, 1.0))
            pace.learn(a_step(1, 1e17, 1.0))  # a step of few tokens says nothing of arithmetic
            pace.learn(a_step(64, 1e17, 0.0))  # nor does one that failed
            pace.learn(a_step(64, 0, 1.0))
            assert pace.known >= before
        reached = sorted(rates)[-NUM_WITNESSES]
        assert pace.known <= max(known, reached)
        assert pace.known >= max(known, reached / 1.06)
        assert saved == sorted(saved)
        assert len(saved) < 30
        assert not saved or saved[-1] == pace.known


def test_the_steps_of_one_start_decide_the_token_budget_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=150,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    model = {"path": str(tmp_path), "load_format": "dummy"}
    config = EngineConfig.model_validate({"model": model, "device": {"name": "cpu"}})
    engine, first = build_engine(config, lambda phase, detail: None)
    assert "until steps of this model have told" in first.settings["scheduler.max_num_batched_tokens"].reason
    for index in range(4):
        params = SamplingParams(seed=0, max_tokens=1)
        prompt = [(index * 50 + i) % 150 for i in range(100)]
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params))
        while engine.has_work:
            engine.step()
    file = ceilings_file(read_machine(), "cpu")
    [(name, rate)] = file.read().step_flops_per_second.items()
    assert rate > 0
    _, second = build_engine(config, lambda phase, detail: None)
    assert "steps of this model reach" in second.settings["scheduler.max_num_batched_tokens"].reason
    assert second.bytes_per_second >= first.bytes_per_second
    slow = Ceilings(1.0, 1.0, {name: 1.0})
    os.unlink(file.path)
    file.add(slow)
    _, third = build_engine(config, lambda phase, detail: None)
    assert third.settings["scheduler.max_num_batched_tokens"].value == 64
    assert third.fingerprint == second.fingerprint == first.fingerprint  # it changes no output
