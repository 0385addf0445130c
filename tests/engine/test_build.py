"""The composition root on the default model's family, with random weights."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.scheduling.step_times import StepTimes
from engine.types import Request, SamplingParams


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    """A directory with nothing but a config."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=300,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def _build(path: Path, **sections: dict[str, object]):
    settings = {"model": {"path": str(path), "load_format": "dummy"}, "device": {"num_threads": 1}}
    return build_engine(EngineConfig.model_validate({**settings, **sections}), lambda phase, detail: None)


def _tokens(engine) -> list[int]:
    params = SamplingParams(seed=0, max_tokens=6, temperature=0.0)
    engine.add(Request(request_id="r", prompt_token_ids=list(range(1, 20)), params=params))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step()[0] for token in output.token_ids]
    return tokens


def test_every_auto_is_resolved_with_a_reason(dummy):
    _, model = _build(dummy)
    assert set(model.settings) >= {"device.name", "device.kernels", "model.dtype", "model.quantization"}
    assert all(setting.value != "auto" and setting.source for setting in model.settings.values())
    assert model.max_model_len == 128
    assert set(model.phase_seconds) >= {"plan", "weights", "kv_cache"}


def test_triton_in_the_interpreter_says_what_torch_says(dummy, monkeypatch):
    exact = {"path": str(dummy), "load_format": "dummy", "quantization": "none", "dtype": "float32"}
    torch_engine, _ = _build(dummy, model=exact, device={"kernels": "torch", "num_threads": 1})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_engine, model = _build(dummy, model=exact, device={"kernels": "triton", "num_threads": 1})
    assert model.settings["device.kernels"].value == "triton"
    assert _tokens(triton_engine) == _tokens(torch_engine)


def test_triton_without_a_gpu_is_refused(dummy, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no GPU"):
        _build(dummy, device={"kernels": "triton", "num_threads": 1})


def test_the_fingerprint_changes_with_what_changes_numbers(dummy, monkeypatch):
    compiled, on_torch = ({"kernels": name, "num_threads": 1} for name in ("numba", "torch"))
    int8 = {"path": str(dummy), "load_format": "dummy", "quantization": "int8"}
    prints = {
        _build(dummy, device=compiled)[1].fingerprint,
        _build(dummy, device=on_torch)[1].fingerprint,
        _build(dummy, device=on_torch, seed=1)[1].fingerprint,
        _build(dummy, device=on_torch, model=int8)[1].fingerprint,
        _build(dummy, device=on_torch, model=int8 | {"max_model_len": 64})[1].fingerprint,
        _build(dummy, device=on_torch, kv_cache={"block_size": 32})[1].fingerprint,
        _build(dummy, device=on_torch, kv_cache={"dtype": "float16"})[1].fingerprint,
        _build(dummy, device=on_torch, kv_cache={"dtype": "int8"})[1].fingerprint,
        _build(dummy, device={"kernels": "torch", "num_threads": 2})[1].fingerprint,
    }
    assert len(prints) == 9
    assert _build(dummy, device=compiled)[1].fingerprint in prints
    monkeypatch.setattr("kernels.numba.core.processor.features", lambda: frozenset({"avx2"}))
    assert _build(dummy, device=compiled)[1].fingerprint not in prints, "another processor"


@pytest.mark.parametrize("ties_output", [True, False])
def test_the_output_layer_is_counted_for_rows_that_have_logits(dummy, ties_output):
    config = LlamaConfig.from_pretrained(dummy)
    config.tie_word_embeddings = ties_output
    config.save_pretrained(dummy)
    engine, _ = _build(dummy)
    engine.add(Request(request_id="r", prompt_token_ids=[1] * 19, params=SamplingParams(seed=0, max_tokens=2)))
    layers = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)
    in_layers = 19 * 2 * layers
    attention = 19 * 10 * (2 * 4 * 2 * 16)  # on average, a token attends to ten
    assert engine.step()[2].flops == in_layers + attention + 2 * 300 * 32


def test_a_target_for_the_wait_between_tokens_measures_steps_and_changes_no_answer(dummy, monkeypatch):
    assert _build(dummy)[0].scheduler.pacing is None
    phases: list[str] = []
    settings = {"model": {"path": str(dummy), "load_format": "dummy"}, "device": {"num_threads": 1}}
    config = EngineConfig.model_validate(settings | {"scheduler": {"target_itl_ms": 0.01}})
    engine, _ = build_engine(config, lambda phase, detail: phases.append(phase))
    assert "step_costs" in phases
    monkeypatch.setattr(StepTimes, "seconds", lambda _, work: 1e-4 * work.num_tokens)  # whatever else runs here
    params = SamplingParams(seed=0, max_tokens=40, temperature=0.0)
    engine.add(Request(request_id="stream", prompt_token_ids=[5], params=params))
    engine.step()
    engine.add(Request(request_id="prompt", prompt_token_ids=list(range(1, 90)), params=params))
    limits, chunks, tokens = set(), [], []
    while engine.has_work:
        outputs, _, stats = engine.step()
        limits.add(stats.prompt_limit)
        chunks.append(stats.num_prompt_tokens)
        assert stats.predicted > 0
        tokens += [token for output in outputs if output.request_id == "prompt" for token in output.token_ids]
    assert "least" in limits  # steps of 10 microseconds are not to be had
    assert 0 < max(chunks) < 89
    untargeted, _ = _build(dummy)
    untargeted.add(Request(request_id="prompt", prompt_token_ids=list(range(1, 90)), params=params))
    expected = []
    while untargeted.has_work:
        expected += [token for output in untargeted.step()[0] for token in output.token_ids]
    assert tokens == expected


@pytest.mark.parametrize("target", [0, -5, float("nan"), float("inf"), 1e9, True, "fast", [50]])
def test_a_target_that_is_no_time_is_refused(target):
    with pytest.raises(ValueError, match="target_itl_ms"):
        EngineConfig.model_validate({"scheduler": {"target_itl_ms": target}})
