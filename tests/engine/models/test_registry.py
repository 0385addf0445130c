"""Which model runs a config, what is refused and why, and what loading says of a checkpoint that does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DbrxConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)
from transformers.utils import logging

from engine.models.llama import Llama
from engine.models.model import Model
from engine.models.registry import FALLBACK, MODELS, build_model
from engine.models.transformers_fallback import TransformersModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
WINDOWED = ["sliding_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def sizes(**changes: object) -> dict[str, object]:
    return {**SIZES, **changes}


def on_meta(config: PreTrainedConfig, **options: object) -> Model:
    with torch.device("meta"):
        return build_model(config, dtype=torch.bfloat16, **options)


def checkpoint(config: PreTrainedConfig) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_config(copy.deepcopy(config)).state_dict())


@pytest.mark.parametrize("family", MODELS)
def test_every_registered_family_builds_with_our_own_layers(family: str) -> None:
    config = AutoConfig.for_model(family, **sizes())
    assert isinstance(on_meta(config, implementation="own"), Llama)


def test_auto_takes_our_own_layers_where_there_are_any_and_transformers_elsewhere() -> None:
    assert isinstance(on_meta(Qwen3Config(**sizes(head_dim=8))), Llama)
    assert isinstance(on_meta(Olmo2Config(**sizes())), TransformersModel)
    assert isinstance(on_meta(LlamaConfig(**sizes(hidden_act="gelu"))), TransformersModel)
    assert isinstance(on_meta(LlamaConfig(**sizes()), implementation="transformers"), TransformersModel)
    assert FALLBACK.endswith(":TransformersModel")


@pytest.mark.parametrize(
    ("config", "reason"),
    [(Olmo2Config(**sizes()), "olmo2 has no layers of our own"), (LlamaConfig(**sizes(hidden_act="gelu")), "'gelu'")],
)
def test_asking_for_own_layers_that_do_not_exist_is_an_error(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        on_meta(config, implementation="own")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**sizes()), "later tokens"),
        (T5Config(), "encoder-decoder"),
        (MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2), "recurrent layers"),
        (Qwen3NextConfig(**sizes()), "recurrent layers"),
        (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "attention interface"),
        (MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4), "attention interface"),
        (FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), "falcon cannot run"),
        (DeepseekV3Config(num_hidden_layers=2), "differ in size: 192, 192, 128"),
        (GptOssConfig(**sizes(head_dim=8)), "its attention has sinks"),
        (GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4), "a list of its own"),
        (DbrxConfig(), r"transformers' code for it does not run from this config\.json"),
        (Llama4TextConfig(**sizes(head_dim=8)), "no decoder"),
        (LlamaConfig(**sizes(architectures=["LlamaForSequenceClassification"])), "does not generate text"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_what_cannot_run_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        on_meta(config)


def test_fallback_refuses_lengths_where_rotations_would_follow_the_batch() -> None:
    config = Phi3Config(**sizes(rope_parameters=LONGROPE, original_max_position_embeddings=16))
    with pytest.raises(ValueError, match="max_model_len to 16 or less"):
        on_meta(config, implementation="transformers")
    assert isinstance(on_meta(config, implementation="transformers", max_model_len=16), TransformersModel)


def test_a_model_on_the_meta_device_has_the_sizes_of_the_real_one() -> None:
    for config in (LlamaConfig(**sizes(tie_word_embeddings=True)), MixtralConfig(**sizes(num_local_experts=4))):
        expected = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
        model = on_meta(config)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_building_a_model_leaves_its_config_as_it_was() -> None:
    config = Gemma2Config(**sizes(head_dim=8))
    before = config.to_dict()
    on_meta(config)
    assert config.to_dict() == before
    assert config._attn_implementation != "peregrine"


@pytest.mark.parametrize("implementation", ["own", "transformers"])
def test_attention_layers_say_what_each_layer_asks_of_its_back_end(implementation: str) -> None:
    mistral = on_meta(MistralConfig(**sizes(sliding_window=7, head_dim=12)), implementation=implementation)
    assert [layer.index for layer in mistral.attention_layers] == [0, 1]
    for layer in mistral.attention_layers:
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 12)
        assert (layer.window, layer.soft_cap) == (7, None)
        assert layer.scale == pytest.approx(12**-0.5)


def test_gemma_2_has_its_windows_scales_and_soft_caps() -> None:
    attention = {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0, "head_dim": 8}
    config = Gemma2Config(**sizes(sliding_window=5, layer_types=WINDOWED, **attention))
    layers = on_meta(config).attention_layers
    assert [layer.window for layer in layers] == [5, None]
    assert [layer.soft_cap for layer in layers] == [2.0, 2.0]
    assert [layer.scale for layer in layers] == [0.125, 0.125]


@pytest.mark.parametrize("implementation", ["own", "transformers"])
def test_missing_unknown_and_misshapen_weights_are_named(implementation: str) -> None:
    config = LlamaConfig(**sizes())
    weights = checkpoint(config)
    key_weight, gate = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    def load(changed: dict[str, Tensor]) -> None:
        build_model(config, dtype=torch.float32, implementation=implementation).load_weights(changed.items())

    load(weights)
    without = {name: weight for name, weight in weights.items() if name not in (key_weight, gate)}
    with pytest.raises(ValueError, match=rf"2 missing .*{gate}, {key_weight}"):
        load(without)
    with pytest.raises(ValueError, match=r"1 not part of the model .*model\.layers\.7\.extra"):
        load({**weights, "model.layers.7.extra": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight.*4, 32"):
        load({**weights, key_weight: torch.zeros(4, 32)})


def test_weights_that_a_checkpoint_repeats_are_no_error() -> None:
    config = LlamaConfig(**sizes(tie_word_embeddings=True))
    weights = checkpoint(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    model = build_model(config, dtype=torch.float32)
    model.load_weights(weights.items())
    assert isinstance(model, Llama)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_weights_are_converted_to_the_dtype_of_the_model() -> None:
    config = Qwen3Config(**sizes(head_dim=8))
    weights = {name: weight.to(torch.float16) for name, weight in checkpoint(config).items()}
    model = build_model(config, dtype=torch.bfloat16)
    model.load_weights(weights.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = weights["model.layers.1.self_attn.q_proj.weight"].to(torch.bfloat16)
    merged = dict(model.named_parameters())["layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(merged[:32], expected)
