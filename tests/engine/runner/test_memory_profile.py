"""One large step before the cache is made: what it takes decides how large the cache may be."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from engine.attention.torch_backend import TorchAttention
from engine.config import EngineConfig
from engine.loading.loader import read_model_facts
from engine.models.model import Decoder, Model
from engine.models.registry import build_model
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import read_machine
from engine.planning.sizes import PlanError
from engine.runner.memory_profile import largest_step, measure_workspace, plan_with_workspace
from engine.sampling.host_sampler import HostSampler

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
GPU = replace(read_machine(), device="cuda", total_bytes=2**32, available_bytes=2**32)


class FakeMeter:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def peak(self) -> int:
        self.calls.append("peak")
        return 12345


class WatchedModel(Decoder):
    """Passes everything on, and notes how many rows were asked for."""

    def __init__(self, model: Model, meter: FakeMeter) -> None:
        self.model, self.meter = model, meter
        self.attention_layers, self.vocab_size = model.attention_layers, model.vocab_size

    def forward(self, batch, attention):
        self.meter.calls.append(f"forward {len(batch.input_ids)}")
        return self.model.forward(batch, attention)

    def compute_logits(self, hidden):
        self.meter.calls.append(f"logits {len(hidden)}")
        return self.model.compute_logits(hidden)


@pytest.fixture
def config(tmp_path) -> EngineConfig:
    CONFIG.architectures = ["LlamaForCausalLM"]
    CONFIG.save_pretrained(tmp_path)
    sections = {
        "model": {"path": str(tmp_path), "load_format": "dummy"},
        "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 100},
    }
    return EngineConfig.model_validate(sections)


def _plan(config: EngineConfig, **settings: object) -> MemoryPlan:
    merged = {**config.model_dump(), **settings}
    config = EngineConfig.model_validate(merged)
    return plan_memory(read_model_facts(config.model), config, GPU)


def test_the_largest_step_has_every_token_and_every_row_of_logits(config: EngineConfig) -> None:
    plan = _plan(config)
    batch = largest_step(plan)
    assert plan.max_num_logits == 100  # of prompts that are scored all rows may be
    assert sum(item.num_new_tokens for item in batch) == sum(item.num_logits for item in batch) == 100
    assert [item.num_sampled_rows for item in batch] == [1] * 6
    drafting = largest_step(_plan(config, speculation={"method": "ngram", "num_drafts": 4}))
    assert sum(item.num_new_tokens for item in drafting) == sum(item.num_logits for item in drafting) == 100
    assert [item.num_sampled_rows for item in drafting] == [5] * 6
    short = largest_step(replace(plan, max_model_len=10))
    assert [item.num_new_tokens for item in short] == [10] * 6
    narrow = largest_step(replace(plan, max_num_batched_tokens=6, max_num_logits=6))
    assert [item.num_new_tokens for item in narrow] == [1] * 6
    wide = largest_step(_plan(config, scheduler={"max_num_seqs": 6, "max_num_batched_tokens": 1000}))
    assert sum(item.num_new_tokens for item in wide) == 1000
    assert sum(item.num_logits for item in wide) == 6 + 256


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_the_measurement_covers_the_model_and_the_sampler(config: EngineConfig, num_drafts: int) -> None:
    plan = _plan(config, speculation={"method": "ngram" if num_drafts else "none", "num_drafts": num_drafts or 1})
    plan = replace(plan, device="cpu", kv_codec="float32")
    model = build_model(CONFIG, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    meter = FakeMeter()
    watched = WatchedModel(model, meter)
    found = measure_workspace(watched, HostSampler(64), TorchAttention, plan=plan, meter=meter)
    assert found == 12345
    assert meter.calls == ["start", "forward 100", "logits 100", "peak"]


def test_what_a_step_takes_is_not_given_to_the_cache(config: EngineConfig) -> None:
    estimate = _plan(config)
    more = plan_with_workspace(estimate, config, GPU, estimate.workspace_bytes + 2**30)
    assert more.workspace_bytes == estimate.workspace_bytes + 2**30
    lost = estimate.num_kv_tokens - more.num_kv_tokens
    assert lost == pytest.approx(2**30 / estimate.kv_bytes_per_token, abs=16)
    less = plan_with_workspace(estimate, config, GPU, 0)
    assert less.num_kv_tokens > estimate.num_kv_tokens
    with pytest.raises(PlanError, match=r"lower scheduler\.max_num_batched_tokens"):
        plan_with_workspace(estimate, config, GPU, 2**32)


def test_sequences_do_not_become_longer_than_the_model_was_built_for(config: EngineConfig) -> None:
    estimate = _plan(config)
    shorter = replace(estimate, max_model_len=300)
    measured = plan_with_workspace(shorter, config, GPU, 1000)
    assert measured.max_model_len == 300
    assert measured.model_config == shorter.model_config
    assert measured.settings["model.max_model_len"] == shorter.settings["model.max_model_len"]
