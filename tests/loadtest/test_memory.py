"""Memory beside the plan: the checkpoints that are made for it, and the figures that come of a load and of a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.loading.loader import read_model_facts
from engine.planning.engine_plan import plan_memory
from engine.planning.machine import read_machine
from loadtest.micro import memory
from loadtest.micro.shapes import QWEN_600M
from tests.support.loaded_models import kept_as, load_compiled

SMALL = replace(
    QWEN_600M, name="small", hidden_size=256, intermediate_size=512, num_layers=8, num_heads=4, num_kv_heads=2,
    head_dim=64, vocab_size=512,
)  # fmt: skip
KEPT = {"GGUF Q4_K_M": {"Q4_K", "Q4_K + Q6_K", "Q6_K"}, "GPTQ int4": {"Q4_0", "float16"}, "bfloat16": {"bfloat16"}}
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not count memory")


@pytest.mark.parametrize("container", memory.CONTAINERS)
def test_a_checkpoint_of_noise_is_a_model_in_its_container_s_formats(tmp_path: Path, container: str) -> None:
    path = memory.CONTAINERS[container](tmp_path, SMALL)
    model = load_compiled(path)
    found = {kept.split(",")[0] for layer in range(8) for kept in kept_as(model, layer=layer).values()}
    assert found == KEPT[container]


def test_a_load_tells_its_peak_and_what_stays(tmp_path: Path) -> None:
    config = memory._config(memory.CONTAINERS["GPTQ int4"](tmp_path, SMALL), num_threads=1)
    found = memory.load_once(config.model_dump_json())
    assert 0 < found["kept"] <= found["peak"]
    assert found["peak"] <= plan_memory(read_model_facts(config.model), config, read_machine()).loading_bytes


@pytest.mark.slow
def test_every_figure_is_measured_beside_its_plan(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "SHAPES", {"small": SMALL})
    monkeypatch.setattr(memory, "RESULTS", tmp_path)
    options = ["--shapes", "small", "--containers", "GGUF Q4_K_M", "--save", "--folder", str(tmp_path)]
    assert memory.main(options) == 0
    [row] = json.loads((tmp_path / "micro-memory.json").read_text())["rows"]
    assert row["serving"] > row["stays"] > 0
    assert row["planned of serving"] > 0.5
