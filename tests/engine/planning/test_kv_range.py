"""Keys and values that float16 cannot hold are kept in a wider cache, and answers stay the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo
from engine.models.registry import build_model
from engine.planning.kv_range import bound_of_keys_and_values
from engine.types import Request, SamplingParams

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": None,
}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
PROMPT = [5, 17, 200, 3, 99, 42, 7, 8, 250, 11]


def make(kind: str, *, keys: float = 1.0, key_bias: float = 0.0, values: float = 1.0) -> PreTrainedModel:
    """With keys and values of other sizes, which queries and the output projection make up for."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.mul_(4 / keys)
            attention.k_proj.weight.mul_(keys)
            attention.v_proj.weight.mul_(10 * values)
            attention.o_proj.weight.mul_(1 / values)
            if kind == "qwen2":
                attention.k_proj.bias.add_(key_bias)
    return model


def start(
    model: PreTrainedModel, directory: Path, phases: list[tuple[str, str]] | None = None, **cache: str
) -> tuple[Engine, ModelInfo]:
    """phases: gets what the start reports"""
    model.save_pretrained(directory)
    settings = {
        "model": {"path": str(directory), "quantization": "none", "tokenizer": str(directory)},
        "device": {"num_threads": 1},
        "kv_cache": cache,
    }
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    heard = [] if phases is None else phases
    return build_engine(EngineConfig.model_validate(settings), lambda phase, detail: heard.append((phase, detail)))


def answer(engine: Engine) -> list[int]:
    engine.add(
        Request(request_id="r", prompt_token_ids=PROMPT, params=SamplingParams(seed=0, max_tokens=8, temperature=0.0))
    )
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            tokens += output.token_ids
    return tokens


def expected(model: PreTrainedModel) -> list[int]:
    ids = torch.tensor([PROMPT])
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("sizes", [{"keys": 3e5}, {"values": 3e6}])
def test_a_cache_that_would_overflow_is_kept_in_float32(sizes: dict[str, float], tmp_path: Path) -> None:
    model = make("llama", **sizes)
    engine, info = start(model, tmp_path)
    assert info.settings["device.kernels"].value == "numba"
    setting = info.settings["kv_cache.dtype"]
    assert setting.value == "float32"
    assert "float16 ends at 65,504" in setting.reason
    assert answer(engine) == expected(model)


def test_ordinary_keys_stay_in_float16_and_a_wish_is_a_wish(tmp_path: Path) -> None:
    assert start(make("llama"), tmp_path / "a")[1].settings["kv_cache.dtype"].value == "float16"
    settings = start(make("llama", keys=3e5), tmp_path / "b", dtype="bfloat16")[1].settings
    assert settings["kv_cache.dtype"].value == "bfloat16"


def test_a_wish_for_a_cache_that_may_overflow_is_commented(tmp_path: Path) -> None:
    model = make("llama", keys=300.0)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0].mul_(1e4)  # beyond the bound, if not for token 0
    phases: list[tuple[str, str]] = []
    settings = start(model, tmp_path, phases, dtype="float16")[1].settings
    assert settings["kv_cache.dtype"].value == "float16"
    (note,) = [detail for phase, detail in phases if phase == "note"]
    assert note.startswith("kv_cache.dtype is float16, but keys or values may reach")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_no_key_or_value_is_beyond_the_bound_nor_far_below_it(kind: str, scale: float) -> None:
    hf = make(kind, keys=scale, key_bias=50 * scale, values=scale)
    model = build_model(hf.config, dtype=torch.float32)
    model.load_weights(hf.state_dict().items())
    bound = bound_of_keys_and_values(model)
    largest = 0.0

    def look(module: torch.nn.Module, args: object, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    for layer in hf.model.layers:
        layer.self_attn.v_proj.register_forward_hook(look)
        (layer.self_attn.k_norm if kind == "qwen3" else layer.self_attn.k_proj).register_forward_hook(look)
    with torch.inference_mode():
        hf(torch.arange(100)[None])
    assert largest < bound < 30 * largest
