"""Parts of the measurements for a GPU: shapes and floors, the tuner's table, the wheels."""

import importlib.util
import json
import lzma
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.loading.loader import read_model_facts
from kernels.triton import configs
from kernels.triton.configs import AttentionConfig
from loadtest.gpu.candidates import Load, Tunable, tunables
from loadtest.gpu.context import Context
from loadtest.gpu.errors import poisoned_memory, relative_error
from loadtest.gpu.records import Ceilings, Problem, Tuned
from loadtest.gpu.shapes import LLAMA_8B, TINY
from loadtest.gpu.stopwatch import Work, num_sets
from loadtest.gpu.tune import tune, write_entry
from loadtest.gpu.wheels import needed_packages, read_pins, write_flash_wheel
from loadtest.micro.shapes import QWEN_600M, Shape
from tests import ROOT


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_600M, TINY], ids=lambda shape: shape.name)
def test_a_shape_is_the_model_that_the_engine_builds(shape: Shape) -> None:
    with shape.folder(max_length=4096) as folder:
        facts = read_model_facts(ModelConfig(path=str(folder), load_format="dummy"))
    output = 0 if shape.ties_output else shape.num_output_parameters
    assert facts.num_linear_parameters == shape.num_linear_parameters + output
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in facts.attention_layers} == {
        (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    }
    assert len(facts.attention_layers) == shape.num_layers


def test_the_floors_are_those_that_the_goals_were_set_against() -> None:
    """Milliseconds at 4.3 TB/s and 790 TFLOP/s, computed by hand."""
    ceilings = Ceilings(4.3e12, 790e12, 50 << 20)

    def decode(batch: int, length: int) -> float:
        return 1e3 * ceilings.floor(num_bytes=LLAMA_8B.decode_bytes(batch, length))

    assert decode(1, 1024) == pytest.approx(3.52, abs=0.01)
    assert decode(32, 4096) == pytest.approx(7.49, abs=0.01)
    assert decode(128, 4096) == pytest.approx(19.5, abs=0.05)
    prefill = 1e3 * ceilings.floor(num_bytes=0, num_flops=LLAMA_8B.prefill_flops(4096))
    assert prefill == pytest.approx(77.9, rel=0.02)


def test_the_tuner_tries_what_it_started_from_first_and_nothing_twice() -> None:
    context = Context(is_rehearsal=True, seed=0, deadline=0.0, ceilings=None, tables="")
    for tunable in tunables(context):
        configs = tunable.configs()
        assert configs[0] == tunable.base
        assert len(set(configs)) == len(configs) > 1


def test_entries_of_a_table_are_complete_and_stay(tmp_path: Path) -> None:
    context = Context(is_rehearsal=True, seed=0, deadline=0.0, ceilings=None, tables=str(tmp_path))
    (tunable,) = tunables(context)
    write_entry(context, tunable, "128 bfloat16", {"decode_warps": 8})
    write_entry(context, tunable, "64 bfloat16", {"prompt_keys": 128})
    path = write_entry(context, tunable, "128 bfloat16", {"prompt_warps": 2})
    entries = json.loads(path.read_text())["kernels"]["attention"]
    assert AttentionConfig(**entries["128 bfloat16"]).decode_warps == 8
    assert AttentionConfig(**entries["128 bfloat16"]).prompt_warps == 2
    assert AttentionConfig(**entries["64 bfloat16"]).prompt_keys == 128


def test_a_config_that_is_fast_and_wrong_makes_room_for_the_next(tmp_path: Path) -> None:
    """Or impossible, where a kernel needs a little more than in what was timed."""
    context = Context(is_rehearsal=True, seed=0, deadline=time.time() + 60, ceilings=None, tables=str(tmp_path))
    errors = {3: RuntimeError("out of shared memory"), 5: 0.5, 8: 1e-9}
    seconds = {3: 0.0, 5: 0.0, 8: 0.15, 30: 0.8}

    def work(config: AttentionConfig) -> Work:
        return lambda _: time.sleep(seconds[config.decode_warps])

    def check(config: AttentionConfig) -> float:
        error = errors[config.decode_warps]
        if isinstance(error, RuntimeError):
            raise error
        return error

    tunable = Tunable(
        kernel="attention",
        keys=["128 bfloat16"],
        base=AttentionConfig(decode_warps=30),
        axes={"decode_warps": (3, 5, 8)},
        loads=lambda: [Load(work, num_sets=1)],
        check=check,
        bound=1e-2,
    )
    found = list(tune(context, tunable, share=1.0))
    assert [type(record) for record in found] == [Problem, Problem, Tuned]
    complaints = "\n".join(sorted(record.text for record in found[:2]))
    assert re.search("impossible elsewhere .RuntimeError.*\n.*wrong by 0.5", complaints)
    table = json.loads((tmp_path / found[2].table).read_text())
    assert table["kernels"]["attention"]["128 bfloat16"] == found[2].config
    assert found[2].config["decode_warps"] == 8


def test_a_group_larger_than_what_was_measured_gets_tiles_that_are_known_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = configs._FOLDER / "default.json"
    (tmp_path / "default.json").write_text(default.read_text())
    measured = AttentionConfig(decode_rows=16, decode_keys=128, decode_stages=7, prompt_rows=64, prompt_keys=128)
    entry = {"provenance": "", "kernels": {"attention": {"128 bfloat16": asdict(measured)}}}
    (tmp_path / "sm_90.json").write_text(json.dumps(entry))
    monkeypatch.setattr(configs, "_FOLDER", tmp_path)
    configs._table.cache_clear()
    try:
        assert configs.attention_config(128, 16, torch.bfloat16, chip="sm_90") == measured
        larger = configs.attention_config(128, 48, torch.bfloat16, chip="sm_90")
        assert (larger.decode_rows, larger.decode_keys, larger.decode_stages) == (64, 64, 5)
        assert (larger.prompt_rows, larger.prompt_keys) == (64, 128)
        largest = configs.attention_config(128, 100, torch.bfloat16, chip="sm_90")
        assert (largest.prompt_rows, largest.prompt_keys) == (128, 64)
    finally:
        configs._table.cache_clear()


def test_memory_that_nobody_writes_is_noticed() -> None:
    with poisoned_memory():
        assert relative_error(torch.empty(3), torch.ones(3)) != 0.0
        assert not relative_error(torch.empty(3), torch.ones(3)) <= 1e9
    assert not torch.are_deterministic_algorithms_enabled()


def test_small_inputs_come_in_many_sets_and_large_ones_in_one() -> None:
    assert num_sets(1, 50 << 20) == 64
    assert num_sets(50 << 20, 50 << 20) == 4
    assert num_sets(1 << 30, 50 << 20) == 1


def test_the_wheels_are_what_the_project_needs_and_pinned() -> None:
    needed = needed_packages()
    assert {"fastapi", "pydantic", "pydantic-core", "msgspec", "gguf", "uvloop", "httptools"} <= needed
    assert not needed & {"torch", "triton", "transformers", "numpy", "pytest"}
    assert needed <= set(read_pins(ROOT / "constraints.txt"))


def test_the_packed_library_travels_as_a_wheel(tmp_path: Path) -> None:
    wheel = write_flash_wheel(lzma.compress(b"library"), tmp_path, version="1.2.3")
    site = tmp_path / "site"
    install = ["install", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    (packed,) = site.rglob("*.xz")
    assert lzma.decompress(packed.read_bytes()) == b"library"
    assert zipfile.ZipFile(wheel).testzip() is None
    assert importlib.util.find_spec("carried_peers") is None  # only where it was carried along
