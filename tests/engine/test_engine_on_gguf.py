"""An engine on GGUF files of every quantisation: matrices stay in the integers of the file and answer as floats do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Format
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo
from engine.loading.gguf.blocks import KINDS
from engine.models.model_error import ModelError
from engine.types import Request, SamplingParams
from kernels.numba.core.formats import NAMES
from tests.support.answers import answer_all
from tests.support.gguf_files import BLOCKS, write_random_blocks

VOCAB_SIZE = 320
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
FORMATS = pytest.mark.parametrize("format", BLOCKS, ids=lambda format: format.name)
Q4_K_M = {"attn_v": Format.Q6_K, "ffn_down": Format.Q6_K, "output": Format.Q6_K}  # as llama.cpp mixes them
EXACT = {"dtype": "float32", "quantization": "none"}


def build(path: Path, kernels: str = "numba", **model: str) -> tuple[Engine, ModelInfo]:
    sections = {"model": {"path": str(path), **model}, "device": {"name": "cpu", "kernels": kernels, "num_threads": 2}}
    return build_engine(EngineConfig.model_validate(sections), lambda phase, detail: None)


def make_requests() -> list[Request]:
    rng = random.Random(3)
    params = SamplingParams(seed=0, max_tokens=6, temperature=0.0, logprobs=2)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 33, 70)]
    return [Request(request_id=str(i), prompt_token_ids=ids, params=params) for i, ids in enumerate(prompts)]


def assert_answers_are_those_of_floats(ours: Engine, path: Path) -> None:
    theirs, _ = build(path, kernels="torch", **EXACT)
    answered, expected = (answer_all(engine, make_requests()) for engine in (ours, theirs))
    assert answered.tokens == expected.tokens
    assert len({tuple(tokens) for tokens in answered.tokens.values()}) > 2  # they say different things
    for request_id, (_, logprobs, _) in answered.answers.items():
        for a, b in zip(logprobs, expected.answers[request_id][1], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=4e-3)  # of activations of 16 bits


@FORMATS
def test_every_quantisation_answers_as_its_floats_do(tmp_path: Path, format: Format) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=format.value % 2 == 0)
    path = write_random_blocks(tmp_path / "m.gguf", config, lambda name: format)
    engine, info = build(path)
    kept = {name: list(found) for name, found in info.weights.items()}
    assert kept == {name: [NAMES[KINDS[format]]] for name in kept}
    assert {"embed_tokens", "lm_head", "layers.mlp.down_proj", "layers.self_attn.qkv_proj"} <= kept.keys()
    assert_answers_are_those_of_floats(engine, path)


@FORMATS
def test_every_quantisation_meets_activations_of_8_bits(tmp_path: Path, format: Format) -> None:
    path = write_random_blocks(tmp_path / "m.gguf", LlamaConfig(**SIZES), lambda name: format)
    requests = make_requests()
    engine, info = build(path, activations="int8")
    assert all("by activations of 8 bits" in name for found in info.weights.values() for name in found)
    answered = answer_all(engine, requests)
    assert answer_all(build(path, activations="int8")[0], requests, at_once=1).answers == answered.answers
    exact = answer_all(build(path)[0], requests)
    for request in requests:  # the first token of each has seen the same prompt
        ours, theirs = (one.answers[request.request_id][1][0] for one in (answered, exact))
        assert ours.logprob == pytest.approx(theirs.logprob, abs=0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixture_of_quantisations_is_kept_layer_by_layer(tmp_path: Path, tied: bool) -> None:
    table = Format.Q6_K if tied else Format.Q4_K
    path = write_random_blocks(
        tmp_path / "m.gguf",
        LlamaConfig(**SIZES, tie_word_embeddings=tied),
        lambda name: table if name == "token_embd" else Q4_K_M.get(name, Format.Q4_K),
    )
    engine, info = build(path)
    assert info.weights == {
        "embed_tokens": {"Q6_K" if tied else "Q4_K": 1},
        "layers.self_attn.qkv_proj": {"Q4_K + Q6_K": 2},
        "layers.self_attn.o_proj": {"Q4_K": 2},
        "layers.mlp.gate_up_proj": {"Q4_K": 2},
        "layers.mlp.down_proj": {"Q6_K": 2},
        "lm_head": {"Q6_K": 1},
    }
    assert_answers_are_those_of_floats(engine, path)


def test_parts_in_16_bits_stand_beside_integers_and_files_may_be_split(tmp_path: Path) -> None:
    kinds = {"attn_v": Format.F16, "ffn_down": Format.F32, "attn_k": Format.BF16, "ffn_up": Format.Q5_K}
    write_random_blocks(
        tmp_path / "m.gguf",
        LlamaConfig(**SIZES),
        lambda name: kinds.get(name, Format.Q3_K),
        split_max_tensors=7,
    )
    path = sorted(tmp_path.glob("*.gguf"))[1]
    engine, info = build(path)
    assert info.weights["layers.self_attn.qkv_proj"] == {"Q3_K + float16": 2}
    assert info.weights["layers.mlp.gate_up_proj"] == {"Q3_K + Q5_K": 2}
    assert info.weights["layers.mlp.down_proj"] == {"float16": 2}
    assert answer_all(engine, make_requests()).tokens


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    path = write_random_blocks(tmp_path / "m.gguf", LlamaConfig(**SIZES), lambda name: Format.Q4_K)
    data = bytearray(path.read_bytes())
    data[-(1 << 16) :] = b"\xff" * (1 << 16)
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.gguf: tensor 'blk\.\d\.\w+\.weight' has scales that are no numbers"):
        build(path)
