"""The language models inside of multimodal checkpoints against the whole model's own answers to text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from engine.config import ModelConfig
from engine.loading.loader import load_model, read_model_facts
from engine.loading.text_part import FAMILIES, name_in_text_part
from engine.models.model_error import ModelError
from tests.support.model_cases import OWN_EXPERTS, SIZES, VOCAB_SIZE, WINDOWED, logits_of, prompts

TEXT = {**SIZES, "head_dim": 8, "pad_token_id": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 48}
LLAMA = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION}
GEMMA = {"sliding_window": 5, "layer_types": WINDOWED, "global_head_dim": 16}


def sections(first: int, second: int, third: int) -> dict[str, object]:
    """Positions in three dimensions, of which text has three equal ones."""
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [first, second, third]}


PARTS: dict[str, dict[str, object]] = {
    "gemma3": {"text_config": {**TEXT, "sliding_window": 5, "layer_types": WINDOWED}, "vision_config": VISION},
    "gemma4": {
        "text_config": {
            **TEXT,
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": VISION,
    },
    "gemma4_unified": {"text_config": {**TEXT, **GEMMA}, "vision_config": VISION},
    "idefics3": LLAMA,
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llava": {"text_config": LLAMA["text_config"], "vision_config": {"model_type": "clip_vision_model", **VISION}},
    "llava_next": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION},
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": sections(1, 1, 2)},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": sections(1, 1, 2)}, "vision_config": QWEN_VISION},
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": sections(2, 1, 1)},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **OWN_EXPERTS, "rope_parameters": sections(2, 1, 1)},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "smolvlm": LLAMA,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def make_config(family: str) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **PARTS[family])


def save(config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """A whole model with weights that show in the logits, as a checkpoint with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    model.save_pretrained(directory)
    Tokenizer(tokenizer_models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    return model


def largest_difference(whole: PreTrainedModel, directory: Path, implementation: str) -> float:
    """Between the whole model's answers to text and those of the part that is loaded, in parts of the largest."""
    config = ModelConfig.model_validate({"path": str(directory), "implementation": implementation})
    part = load_model(config, dtype=torch.float32, seed=0).model
    sequences = [[6 + token % 90 for token in ids] for ids in prompts((23, 9, 17))]
    differences = []
    for ids, ours in zip(sequences, logits_of(part, sequences), strict=True):
        with torch.inference_mode():
            theirs = whole(torch.tensor([ids]), use_cache=False).logits[0]
        differences.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    return max(differences)


def test_every_family_of_the_list_is_tried() -> None:
    assert set(PARTS) == set(FAMILIES)


@pytest.mark.parametrize("family", PARTS)
def test_text_is_answered_as_the_whole_model_answers_it(family: str, tmp_path: Path) -> None:
    whole = save(make_config(family), tmp_path)
    for implementation in ("auto", "transformers"):
        assert largest_difference(whole, tmp_path, implementation) < 1e-5
    facts = read_model_facts(ModelConfig(path=str(tmp_path)))
    assert facts.architecture == type(whole).__name__
    assert facts.num_parameters < whole.num_parameters()


@pytest.mark.parametrize(
    ("family", "place", "head"),
    [
        ("llava", "model.language_model", "lm_head"),
        ("mistral3", "model.language_model", "lm_head"),
        ("gemma3", "model.language_model", "lm_head"),
        ("qwen2_5_vl", "model", "lm_head"),
        ("qwen3_vl", "language_model.model", "language_model.lm_head"),
    ],
)
def test_the_part_is_found_under_each_name_that_releases_gave_it(
    family: str, place: str, head: str, tmp_path: Path
) -> None:
    whole = save(make_config(family), tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {}
    for name, weight in load_file(file).items():
        alone = name_in_text_part(name) or f"model.vision_tower.{name}"
        if name_in_text_part(name) is not None:
            alone = alone.replace("lm_head", head) if alone.startswith("lm_head") else place + alone[len("model") :]
        renamed[alone] = weight
    save_file(renamed, file, metadata={"format": "pt"})
    assert largest_difference(whole, tmp_path, "auto") < 1e-5


def test_experts_are_read_whichever_way_round_they_are_kept(tmp_path: Path) -> None:
    whole = save(make_config("qwen3_vl_moe"), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {
        name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    for implementation in ("auto", "transformers"):
        assert largest_difference(whole, tmp_path, implementation) < 1e-5


def test_the_template_of_a_processor_is_the_models(tmp_path: Path) -> None:
    save(make_config("qwen2_5_vl"), tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    loaded = load_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32, seed=0)
    assert loaded.tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("family", ["paligemma", "mllama", "got_ocr2"])
def test_families_whose_text_is_not_alone_are_refused(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{family} is a model for more than text"):
        read_model_facts(ModelConfig(path=str(tmp_path)))
