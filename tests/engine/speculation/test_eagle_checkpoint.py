"""Files of EAGLE heads: every published layout is read, and what does not fit is refused with the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import SpeculationConfig
from engine.speculation.draft_tree import MAX_CHILDREN
from engine.speculation.eagle import EagleProposer
from engine.speculation.eagle_checkpoint import EagleCheckpoint, open_eagle_checkpoint
from engine.speculation.eagle_head import EagleHead
from engine.speculation.proposer import DraftModel, ProposerContext, TargetShape, build_proposer, needs_of
from tests.support.eagle_files import (
    AUX_LAYERS,
    LAYOUTS,
    NUM_TARGET_LAYERS,
    TARGET_HIDDEN,
    VARIANTS,
    VOCAB,
    TinyEagle,
    official,
    random_eagle,
    specforge,
    speculators,
    vllm,
    without,
    write,
)

TARGET = TargetShape(
    path="tiny", vocab_size=VOCAB, hidden_size=TARGET_HIDDEN, num_layers=NUM_TARGET_LAYERS, block_size=16
)
HEAD = random_eagle()
Fields = dict[str, object]


def _rows(token_ids: Tensor | None) -> Tensor:
    rows = torch.randn(VOCAB, TARGET_HIDDEN, generator=torch.Generator().manual_seed(9))
    return rows if token_ids is None else rows[token_ids]


def _no_draft_model() -> DraftModel:
    raise AssertionError("a head is no draft model")


CONTEXT = ProposerContext(
    target=TARGET,
    full_group=0,
    num_blocks=10,
    output_rows=_rows,
    embedding_rows=_rows,
    open_draft_model=_no_draft_model,
)


def _open(folder: Path, fields: Fields, tensors: dict[str, Tensor], target: TargetShape = TARGET) -> EagleCheckpoint:
    return open_eagle_checkpoint(write(folder, fields, tensors), target)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    layout, eagle = VARIANTS[name]
    checkpoint = _open(tmp_path, *LAYOUTS[layout](eagle))
    config = checkpoint.config
    assert config.hidden_layers == eagle.aux
    assert (config.norm_before_residual, config.norm_output) == (eagle.norm_before_residual, eagle.norm_output)
    assert (config.mask_token, config.window) == (eagle.mask_token, eagle.window)
    assert checkpoint.is_parallel == (eagle.mask_token is not None)
    weights = checkpoint.read(dtype=torch.float32, device=torch.device("cpu"))
    assert len(weights.layers) == eagle.num_layers
    for index, layer in enumerate(weights.layers):
        for matrix, (weight, bias) in layer.matrices.items():
            assert torch.equal(weight, eagle.tensors[f"layers.{index}.{matrix}.weight"])
            assert (bias is not None) == (f"layers.{index}.{matrix}.bias" in eagle.tensors)
    assert weights.target_ids is None if eagle.known is None else weights.target_ids.tolist() == list(eagle.known)
    assert (weights.embedding is None) == ("embed_tokens.weight" not in eagle.tensors)
    assert len(weights.fused_norms) == {"none": 0, "each": len(eagle.aux), "all": 1}[eagle.fused_norm]


def test_official_heads_are_pickles_of_half_precision_and_name_no_layers(tmp_path: Path) -> None:
    fields, tensors = official(HEAD)
    del fields["eagle_aux_hidden_state_layer_ids"]
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write(tmp_path, fields, halves, name="pytorch_model.bin")
    for num_layers, layers in ((32, (2, 16, 29)), (NUM_TARGET_LAYERS, (2, 2, 2))):
        checkpoint = open_eagle_checkpoint(tmp_path, replace(TARGET, num_layers=num_layers))
        assert checkpoint.config.hidden_layers == layers
        assert not checkpoint.config.norm_before_residual
    weights = checkpoint.read(dtype=torch.float32, device=torch.device("cpu"))
    assert weights.norm.dtype == torch.float32


def test_layers_are_named_by_what_goes_in_or_by_what_comes_out(tmp_path: Path) -> None:
    by_output = _open(tmp_path / "a", *specforge(HEAD)).config.hidden_layers
    assert by_output == _open(tmp_path / "b", *vllm(HEAD)).config.hidden_layers == AUX_LAYERS


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, None]
)
def test_rotations_are_those_of_the_config(tmp_path: Path, scaling: Fields | None) -> None:
    fields, tensors = vllm(HEAD)
    scaled = None if scaling is None else scaling | {"original_max_position_embeddings": 64}
    rope = _open(tmp_path, fields | {"rope_scaling": scaled}, tensors).config.rope
    assert rope.inverse_frequencies[0] == 1.0
    assert (rope.inverse_frequencies[-1] < 500 ** (-6 / 8) * 0.99) == (scaling is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_needed_is_known_without_loading(tmp_path: Path, name: str) -> None:
    layout, eagle = VARIANTS[name]
    write(tmp_path, *LAYOUTS[layout](eagle))
    for method in ("eagle3", "eagle"):
        config = SpeculationConfig(method=method, model=str(tmp_path))
        needs = needs_of(config, TARGET)
        assert (needs.hidden, needs.hidden_layers) == ("all", eagle.aux)
        assert needs.num_drafts == (3 if layout == "speculators" else 5)
        is_parallel = eagle.mask_token is not None
        assert needs.depth_costs_time != is_parallel
        assert needs_of(config.model_copy(update={"parallel_drafting": is_parallel}), TARGET) == needs
        with pytest.raises(ValueError, match=r"parallel_drafting is .*, but the head in .* was made for"):
            needs_of(config.model_copy(update={"parallel_drafting": not is_parallel}), TARGET)
        kept = sum(tensor.numel() for key, tensor in eagle.tensors.items() if key not in ("t2d", "embed_tokens.weight"))
        embedding = VOCAB * eagle.hidden if "embed_tokens.weight" in eagle.tensors else 0
        assert needs.num_bytes == 2 * kept + 4 * embedding
        row = 2 * eagle.num_layers * 2 * 8
        assert needs.kv_bytes_per_token == 4 * (2 * row + -(-eagle.hidden // 16))
        proposer = build_proposer(config, CONTEXT)
        assert isinstance(proposer, EagleProposer)
        assert proposer.needs == needs
    assert needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path), num_drafts=7), TARGET).num_drafts == 7


def test_a_head_without_an_output_layer_has_the_targets(tmp_path: Path) -> None:
    eagle = without(HEAD, "lm_head.weight")
    heads = [EagleHead.load(_open(tmp_path / "its", *vllm(eagle)), CONTEXT)]
    assert HEAD.known is not None
    copied = replace(HEAD, tensors=HEAD.tensors | {"lm_head.weight": _rows(torch.tensor(HEAD.known))})
    checkpoint = _open(tmp_path / "copied", *vllm(copied))
    heads.append(EagleHead.load(checkpoint, CONTEXT))
    x = torch.randn(3, TARGET_HIDDEN)
    assert torch.equal(*(head._output(x) for head in heads))
    assert checkpoint.num_parameters == _open(tmp_path / "its", *vllm(eagle)).num_parameters


def test_a_head_that_ties_its_output_has_its_own_embedding_there(tmp_path: Path) -> None:
    eagle = without(random_eagle(has_embedding=True, hidden=64), "lm_head.weight")
    fields, tensors = vllm(eagle)
    checkpoint = _open(tmp_path, fields | {"tie_word_embeddings": True}, tensors)
    weights = checkpoint.read(dtype=torch.float32, device=torch.device("cpu"))
    assert eagle.known is not None
    assert torch.equal(weights.output, eagle.tensors["embed_tokens.weight"][list(eagle.known)])


def test_where_a_step_cannot_have_trees_drafts_are_chains(tmp_path: Path) -> None:
    write(tmp_path, *vllm(HEAD))
    config = SpeculationConfig(method="eagle3", model=str(tmp_path))
    for verifies_trees, most in ((True, MAX_CHILDREN), (False, 1)):
        proposer = EagleProposer.from_config(config, replace(CONTEXT, verifies_trees=verifies_trees))
        assert proposer._max_children == most


def _changed(eagle: TinyEagle = HEAD, **changes: object) -> tuple[Fields, dict[str, Tensor]]:
    fields, tensors = vllm(eagle)
    return {name: value for name, value in (fields | changes).items() if value != "absent"}, tensors


def _with(name: str, tensor: Tensor | None, eagle: TinyEagle = HEAD) -> tuple[Fields, dict[str, Tensor]]:
    """In vLLM's layout, with one tensor more, another, or one fewer."""
    fields, tensors = vllm(eagle)
    others = {key: value for key, value in tensors.items() if key != name}
    return fields, others if tensor is None else others | {name: tensor}


def _eagle_2() -> tuple[Fields, dict[str, Tensor]]:
    fields, tensors = vllm(without(HEAD, "layers.0.hidden_norm.weight", "d2t", "t2d"))
    return fields, tensors | {"model.fc.weight": torch.zeros(32, 64)}


LAYER = "model.layers.0."
OFFSETS = HEAD.tensors["d2t"]
BAD: dict[str, tuple[tuple[Fields, dict[str, Tensor]], str]] = {
    "another width": (_changed(target_hidden_size=48), r"models with 48 features .*one has 32: .*another model"),
    "another vocabulary": (_changed(vocab_size=30), r"models with 30 tokens .*one has 24: .*another model"),
    "a layer too many": (
        _changed(eagle_aux_hidden_state_layer_ids=[1, 2, 5]),
        r"inputs of layers 1, 2, 5, but the model has layers 0 to 4",
    ),
    "layers that are none": (_changed(eagle_aux_hidden_state_layer_ids=[1, "x"]), "which is no list of layers"),
    "fewer layers than fc": (
        _changed(eagle_aux_hidden_state_layer_ids=[1, 2]),
        r"fc.weight has shape \[32, 96\], but its config and the model ask for \[32, 64\]",
    ),
    "a missing tensor": (_with(f"{LAYER}mlp.up_proj.weight", None), "1 tensors are missing: layers.0.mlp.up_proj"),
    "no fc": (_with("model.fc.weight", None), "no fc.weight, which fuses the states"),
    "another fc": (_with("model.fc.weight", torch.zeros(32, 100)), r"fc.weight has shape \[32, 100\].*\[32, 96\]"),
    "EAGLE-2": (_eagle_2(), r"head of EAGLE-1 or -2, whose fc.weight has shape \[32, 64\]"),
    "a tensor of something else": (
        _with(f"{LAYER}self_attn.q_norm.weight", torch.zeros(8)),
        "1 tensors are no part of an EAGLE-3 head: layers.0.self_attn.q_norm.weight",
    ),
    "no d2t": (_with("model.d2t", None), "knows 12 of 24 tokens, but there is no d2t"),
    "d2t of another length": (_with("model.d2t", OFFSETS[:9]), r"d2t has shape \[9\].*\[12\]"),
    "quantised": (_changed(quantization_config={"quant_method": "fp8"}), "config.json has a quantization_config"),
    "another kind": (_changed(speculators_model_type="dflash"), "'dflash' of speculators"),
    "no mask token": (_changed(random_eagle(mask_token=2), pard_token="absent"), "names no mask token"),
    "a mask token beyond": (_changed(random_eagle(mask_token=2), pard_token=99), "pard_token 99, which is no token"),
    "another activation": (_changed(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "no sizes": (_changed(intermediate_size=None), "intermediate_size None, but it must be a positive number"),
    "a size that is none": (_changed(num_attention_heads="many"), "num_attention_heads 'many'"),
    "uneven heads": (_changed(num_key_value_heads=3), "4 heads of 8, and 3 of keys"),
    "many layers": (_changed(num_hidden_layers=99), "99 layers, and no head has more than 16"),
    "mixed attention": (_changed(layer_types=["full_attention", "sliding_attention"]), "attend in different ways"),
    "a flag that is none": (_changed(norm_output="yes"), "norm_output 'yes', but it must be true or false"),
    "an unknown rotation": (_changed(rope_scaling={"rope_type": "spiral"}), "rotation that cannot be computed"),
    "a scale that is none": (_changed(logit_scale=-1.0), "logit_scale -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_head_that_does_not_fit_is_refused_before_a_tensor_is_read(tmp_path: Path, name: str) -> None:
    (fields, tensors), complaint = BAD[name]
    write(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=complaint) as error:
        needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path)), TARGET)
    assert str(tmp_path) in str(error.value)
    assert "speculation.model" in str(error.value)


BAD_CONTENTS: dict[str, tuple[tuple[Fields, dict[str, Tensor]], str]] = {
    "d2t beyond": (_with("model.d2t", OFFSETS + 1), "d2t leads to tokens 2 to 24, but the vocabulary has 24"),
    "d2t before": (_with("model.d2t", OFFSETS - 2), "d2t leads to tokens -1 to 21"),
    "d2t twice": (_with("model.d2t", -torch.arange(12)), "d2t leads to a token twice"),
    "d2t of floats": (_with("model.d2t", OFFSETS.float()), r"d2t holds torch.float32"),
    "integers": (_with("model.norm.weight", torch.ones(32, dtype=torch.int8)), "norm.weight holds torch.int8"),
    "eight bits": (
        _with("model.fc.weight", torch.zeros(32, 96).to(torch.float8_e4m3fn)),
        "fc.weight holds torch.float8_e4m3fn",
    ),
    "infinity": (_with("lm_head.weight", torch.full((12, 32), torch.inf)), "lm_head.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_contents_that_cannot_be_are_refused_when_they_are_read(tmp_path: Path, name: str) -> None:
    (fields, tensors), complaint = BAD_CONTENTS[name]
    write(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=complaint):
        build_proposer(SpeculationConfig(method="eagle3", model=str(tmp_path)), CONTEXT)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method is eagle3: set speculation\.model"):
        needs_of(SpeculationConfig(method="eagle3"), TARGET)
    with pytest.raises(ValueError, match=r"no EAGLE head in .*nowhere"):
        needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path / "nowhere")), TARGET)
    with pytest.raises(ValueError, match=r"no config\.json"):
        needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path)), TARGET)
    (tmp_path / "config.json").write_text('{"hidden_size": 32')
    with pytest.raises(ValueError, match="cannot be read"):
        needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path)), TARGET)
    fields, _ = speculators(HEAD)
    write(tmp_path, fields, {"x": torch.zeros(1)}, name="other.safetensors")
    with pytest.raises(ValueError, match="has no drafter"):
        needs_of(SpeculationConfig(method="eagle3", model=str(tmp_path)), TARGET)


def test_a_width_of_its_own_needs_an_embedding_of_its_own(tmp_path: Path) -> None:
    eagle = without(VARIANTS["another width"][1], "embed_tokens.weight")
    with pytest.raises(ValueError, match=r"embed_tokens.weight is missing, and the model's has 32 features .*has 48"):
        _open(tmp_path, *vllm(eagle))


ODD: list[object] = [None, -1, 0, 3, 1 << 40, 0.5, True, "x", [], [1], [None], {}, {"type": "x"}, {"rope_type": []}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_a_config_says_it_is_read_or_refused(tmp_path: Path, layout: str) -> None:
    fields, tensors = LAYOUTS[layout](random_eagle(mask_token=1))
    write(tmp_path, fields, tensors)
    inner = fields.get("transformer_layer_config")
    names = [*fields, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "pard_token", "eagle_config"]
    num_refused = 0
    for name in [*names, *(f"inner {name}" for name in (inner if isinstance(inner, dict) else ()))]:
        for value in ODD:
            if name.startswith("inner ") and isinstance(inner, dict):
                changed = fields | {"transformer_layer_config": inner | {name.removeprefix("inner "): value}}
            else:
                changed = fields | {name: value}
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                build_proposer(SpeculationConfig(method="eagle3", model=str(tmp_path)), CONTEXT)
            except ValueError:
                num_refused += 1
    assert num_refused > 100
