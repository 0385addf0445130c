"""The peak of memory while a model is loaded: what the plan says, against what the system counts."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from engine.config import EngineConfig
from engine.loading.loader import read_model_facts
from engine.loading.loading_peak import OTHER_BYTES, Matrix, WeightSizes, loading_peak
from engine.planning.engine_plan import plan_memory
from engine.planning.machine import read_machine
from tests.support import gguf_files
from tests.support.quantized_files import write_random_gptq

LOAD = """
import json, re, sys
from pathlib import Path
import torch
from engine.runner.kernel_backend import KernelBackend
from engine.config import EngineConfig
from engine.planning.machine import freeing_at_once, read_machine
from engine.loading.loader import load_model, read_model_facts
from engine.planning.engine_plan import plan_memory

def read(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

config = EngineConfig.model_validate_json(sys.argv[1])
plan = plan_memory(read_model_facts(config.model), config, read_machine())
back_end = KernelBackend(plan, is_strict=False, is_torch_only=plan.kernels == "torch")
if plan.kernels == "numba":
    back_end.compile()
torch.set_num_threads(plan.num_threads)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = read("VmRSS")
with freeing_at_once():
    loaded = load_model(plan.model_config, dtype=plan.dtype, seed=0, methods=back_end.linear_methods)
    back_end.prepare(loaded.model)
print(json.dumps({"peak": read("VmHWM") - before, "kept": read("VmRSS") - before}))
"""


# pages of a file that the kernel can drop do not count there: memory of the process's own is looked at, again and again
LOAD_BESIDE_FILES = (
    LOAD.replace("VmRSS", "RssAnon")
    .replace(
        "with freeing_at_once():",
        "seen, done = [], threading.Event()\n"
        "def look():\n"
        "    while not done.wait(0.001):\n"
        "        seen.append(read('RssAnon'))\n"
        "looking = threading.Thread(target=look)\n"
        "looking.start()\n"
        "with freeing_at_once():",
    )
    .replace("print(json", "done.set()\nlooking.join()\nprint(json")
    .replace('read("VmHWM")', "max(seen)")
    .replace("import json", "import threading, json")
)


def count(config: EngineConfig, program: str = LOAD) -> dict[str, int]:
    """Bytes at the peak of a load, and those that stay, in a process of its own."""
    command = [sys.executable, "-c", program, config.model_dump_json()]
    counted: dict[str, int] = json.loads(
        subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
    )
    return counted


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 64_000}
DEEP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 2_000}


@pytest.mark.parametrize(
    ("sizes", "tied", "model", "kernels"),
    [
        (WIDE, True, {"quantization": "int4"}, "numba"),
        pytest.param(WIDE, False, {"quantization": "fp16"}, "numba", marks=pytest.mark.slow),
        pytest.param(DEEP, False, {"quantization": "int8"}, "numba", marks=pytest.mark.slow),
        pytest.param(DEEP, True, {"quantization": "none"}, "numba", marks=pytest.mark.slow),
        pytest.param(DEEP, True, {"quantization": "int4", "dtype": "bfloat16"}, "numba", marks=pytest.mark.slow),
        pytest.param(WIDE, True, {"quantization": "int8"}, "torch", marks=pytest.mark.slow),
        pytest.param(DEEP, True, {"quantization": "none"}, "torch", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks of memory")
def test_the_peak_is_what_the_system_counts(tmp_path: Path, sizes, tied: bool, model, kernels: str) -> None:
    LlamaConfig(
        **sizes,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    sections = {
        "model": {"path": str(tmp_path), "load_format": "dummy", **model},
        "device": {"name": "cpu", "kernels": kernels, "num_threads": 2},
    }
    config = EngineConfig.model_validate(sections)
    plan = plan_memory(read_model_facts(config.model), config, read_machine())
    counted = count(config)
    assert 0.85 * counted["peak"] <= plan.loading_bytes <= 1.15 * counted["peak"] + OTHER_BYTES
    assert counted["kept"] <= 1.1 * plan.weight_bytes + 2 * OTHER_BYTES  # what was freed went back to the system


def test_the_peak_is_what_stays_and_the_largest_matrix() -> None:
    rng = random.Random(0)
    for _ in range(200):
        sizes = WeightSizes(floats=rng.choice([2, 4]), scratch=rng.choice([0, 4]))
        matrices = [Matrix(rng.randrange(1, 10**6)) for _ in range(rng.randrange(20))]
        matrices.append(Matrix(rng.randrange(1, 10**6), is_output=True, is_shared=rng.random() < 0.5))
        stays = rng.randrange(10**7)
        peak = loading_peak(stays, matrices, sizes) - OTHER_BYTES
        largest = max(matrix.num_weights for matrix in matrices)
        own = [matrix.num_weights for matrix in matrices if not matrix.is_shared]
        assert stays + sizes.floats * max(own, default=0) <= peak
        assert peak <= stays + (sizes.floats + sizes.scratch) * largest


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks of memory")
def test_a_gguf_takes_little_more_than_what_stays_of_it_and_its_largest_matrix(tmp_path: Path, tied: bool) -> None:
    shape = LlamaConfig(**DEEP, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied)
    path = gguf_files.write_random_blocks(tmp_path / "m.gguf", shape)
    sections = {"model": {"path": str(path)}, "device": {"name": "cpu", "kernels": "numba", "num_threads": 2}}
    config = EngineConfig.model_validate(sections)
    facts = read_model_facts(config.model)
    plan = plan_memory(facts, config, read_machine())
    counted = count(config)
    largest = 4 * max(matrix.num_weights for matrix in facts.matrices)
    assert counted["peak"] <= 1.15 * (counted["kept"] + largest) + OTHER_BYTES
    assert counted["peak"] / 1.05 <= plan.loading_bytes <= 1.15 * (plan.weight_bytes + largest) + OTHER_BYTES
    assert counted["kept"] <= 1.1 * plan.weight_bytes + OTHER_BYTES


@pytest.mark.parametrize("quantization", ["auto", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not count memory")
def test_integers_of_a_checkpoint_take_little_more_than_what_stays(tmp_path: Path, quantization: str) -> None:
    write_random_gptq(tmp_path, **DEEP, num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    model = {"path": str(tmp_path), "quantization": quantization}
    config = EngineConfig.model_validate({"model": model, "device": {"name": "cpu", "num_threads": 2}})
    facts = read_model_facts(config.model)
    plan = plan_memory(facts, config, read_machine())
    counted = count(config, LOAD_BESIDE_FILES)
    largest = 4 * max(matrix.num_weights for matrix in facts.matrices)
    assert counted["peak"] <= 1.15 * (counted["kept"] + (largest if quantization == "none" else 0)) + OTHER_BYTES
    assert counted["peak"] <= 1.05 * plan.loading_bytes  # an allocator's waste differs from run to run
    assert counted["kept"] <= 1.1 * plan.weight_bytes + OTHER_BYTES


def test_a_7b_of_four_bits_starts_on_a_machine_of_8_gib(tmp_path: Path) -> None:
    shape = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    path = gguf_files.write_random_blocks(tmp_path / "m.gguf", shape, is_hole=True)
    config = EngineConfig.model_validate({"model": {"path": str(path)}, "device": {"name": "cpu", "kernels": "numba"}})
    facts = read_model_facts(config.model)
    assert facts.num_parameters == pytest.approx(6.74e9, rel=0.01)
    machine = replace(read_machine(), total_bytes=8 << 30, available_bytes=7 << 30, device="cpu")
    plan = plan_memory(facts, config, machine)
    assert plan.can_load
    assert plan.weight_bytes < 4.5 * 2**30
    assert plan.num_kv_tokens >= plan.max_model_len >= 2048
