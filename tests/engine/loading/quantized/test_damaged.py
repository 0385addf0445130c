"""Quantised checkpoints that are damaged, hostile or of a kind that is not read: a sentence that says what is wrong."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.loading.loader import read_model_facts
from engine.models.model_error import ModelError
from tests.support import quantizers as q
from tests.support.loaded_models import load_compiled, load_plain
from tests.support.quantized_files import write_checkpoint
from tests.support.quantizers import Quantize

Tensors = dict[str, Tensor]
Config = dict[str, object]
Damage = Callable[[Tensors], object]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


def damaged(
    directory: Path, quantize: Quantize, config: dict[str, object], damage: Callable[[Tensors], object]
) -> Path:
    """A checkpoint, with `damage` done to one layer's tensors, which are named by their last words."""
    write_checkpoint(directory, quantize, config, changes={"num_hidden_layers": 1})
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    own = {name.removeprefix(LAYER + "."): tensors.pop(name) for name in list(tensors) if name.startswith(LAYER + ".")}
    damage(own)
    save_file(tensors | {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in own.items()}, file)
    return directory


def change(name: str, value: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


HEADERS: dict[str, tuple[Quantize, Config, Damage, str]] = {
    "bits of a million": (q.gptq(4), GPTQ | {"bits": 1_000_000}, dict.copy, "bits 1000000, but weights have 1 to 8"),
    "bits of nothing": (q.gptq(4), GPTQ | {"bits": "four"}, dict.copy, "bits 'four', which is no whole number"),
    "other bits": (q.gptq(4), GPTQ | {"bits": 8}, dict.copy, "says 8 bits, but its tensors have 4"),
    "no zero points": (q.gptq(4), GPTQ, lambda t: t.pop("qzeros"), "has no qzeros"),
    "no scales": (q.gptq(4), GPTQ, lambda t: t.pop("scales"), "has no scales"),
    "cut off": (q.gptq(4), GPTQ, change("qweight", lambda t: t[:-1]), r"shape \[128, 120\], but the config asks"),
    "groups of 48": (q.gptq(4), GPTQ | {"group_size": 48}, dict.copy, "inputs do not divide into . groups of 48"),
    "scales of another layer": (q.gptq(4), GPTQ, change("scales", lambda t: t[:, :-8]), "scales has shape"),
    "an index that is short": (q.gptq(4, order="even"), GPTQ, change("g_idx", lambda t: t[:5]), "do not fit together"),
    "floats for words": (q.gptq(4), GPTQ, change("qweight", Tensor.float), "qweight is F32, but it must be I32"),
    "another layout": (q.gptq(4), GPTQ | {"checkpoint_format": "marlin"}, dict.copy, "layout is 'marlin'"),
    "gemv": (q.awq(), AWQ | {"version": "gemv"}, dict.copy, "layout is AWQ's 'gemv', but only gemm"),
    "AWQ, groups of 48": (q.awq(), AWQ | {"group_size": 48}, dict.copy, "inputs do not divide into . groups of 48"),
    "AWQ of 3 bits": (q.awq(), AWQ | {"bits": 3}, dict.copy, "16 words for 128 outputs, which 3 bits do not"),
    "a shape that lies": (
        q.compressed_integers(4), COMPRESSED, change("weight_shape", lambda t: t * 0 + 10**17), "its weight_shape is",
    ),
    "a shape of a line": (
        q.compressed_integers(4), COMPRESSED, change("weight_shape", lambda t: t[:1]), "weight_shape has shape",
    ),
    "widths of no bits": (
        q.compressed_integers(4), COMPRESSED, change("weight_packed", lambda t: t[:, :-3]), "which 4 bits do not take",
    ),
    "rotations": (
        q.compressed_integers(4), COMPRESSED | {"transform_config": {"u": {}}}, dict.copy, "rotations",
    ),
    "scales of nobody": (
        q.eight_bit_floats(rows=True), {"quant_method": "fp8"}, change("weight_scale", lambda t: t[:-1]),
        r"shape \[127, 1\], which no matrix of 128 x 128 has",
    ),
    "blocks of another size": (
        q.eight_bit_floats(block=(64, 64), name="weight_scale_inv"), {"quant_method": "fp8"}, dict.copy,
        "blocks of 128",
    ),
    "a state that is no JSON": (
        q.book_of_four_bits(), {"quant_method": "bitsandbytes"},
        change("weight.quant_state.bitsandbytes__nf4", lambda t: t[:9]), "does not say shape",
    ),
    "too few bytes": (
        q.book_of_four_bits(), {"quant_method": "bitsandbytes"}, change("weight", lambda t: t[:-5]),
        "is not the 8192 bytes",
    ),
    "a method that is not known": (q.gptq(4), {"quant_method": "aqlm"}, dict.copy, r"quantised \(aqlm\)"),
    "no method": (q.gptq(4), {"bits": 4}, dict.copy, r"quantised \(none\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_what_headers_show_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    quantize, config, damage, reason = HEADERS[name]
    path = damaged(tmp_path, quantize, config, damage)
    with pytest.raises(ModelError, match=reason) as error:
        read_model_facts(ModelConfig(path=str(path)))
    assert re.search(r"model\.layers\.0\.\w+\.\w+|lm_head: |quantis|quantization_config", str(error.value))


def set_element(name: str, value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return damage


CONTENTS: dict[str, tuple[Quantize, Config, Damage, str]] = {
    "a group that is not there": (q.gptq(4, order="even"), GPTQ, set_element("g_idx", 4), "groups 0 to 4, but"),
    "a group below 0": (q.gptq(4, order="even"), GPTQ, set_element("g_idx", -1), "groups -1 to 3, but there are 4"),
    "scales without end": (q.gptq(4), GPTQ, set_element("scales", torch.inf), "scales has elements that are infinite"),
    "scales of no number": (q.awq(), AWQ, set_element("scales", torch.nan), "scales has elements that are infinite"),
    "exponents of no number": (
        q.mxfp4, COMPRESSED, set_element("weight_scale", 255), "weight_scale has elements that are infinite",
    ),
    "a factor without end": (
        q.book_of_four_bits(), {"quant_method": "bitsandbytes"}, set_element("weight.absmax", torch.inf), "absmax has",
    ),
    "division by 0": (
        q.nvfp4(), COMPRESSED, change("weight_global_scale", torch.zeros_like), "weight_global_scale is 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("load", [load_compiled, load_plain])
def test_what_only_contents_show_is_refused_with_the_layers_name(tmp_path: Path, name: str, load: object) -> None:
    quantize, config, damage, reason = CONTENTS[name]
    path = damaged(tmp_path, quantize, config, damage)
    assert callable(load)
    with pytest.raises(ModelError, match=f"{re.escape(LAYER)}: its .*{reason}"):
        load(path)


def test_mlx_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, q.awq(), None)
    fields = json.loads((tmp_path / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        fields[key] = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="quantised by MLX, for Apple's processors"):
        load_plain(tmp_path)


def test_what_a_method_does_not_explain_is_refused(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.up_proj.weight": torch.zeros(256, 128, dtype=torch.int8)}
    write_checkpoint(tmp_path, {"self_attn": q.gptq(4)}, GPTQ, extra=extra)
    with pytest.raises(ModelError, match=r"up_proj\.weight is I8\), which is no part of gptq's layout"):
        load_plain(tmp_path)


def test_patterns_of_a_config_are_never_matched(tmp_path: Path) -> None:
    """This one would take for ever, and what it says of layers is in their tensors."""
    endless = "re:" + "(a|a)*" * 20 + "$"
    group = {"targets": [endless], "weights": {"num_bits": 4, "type": "int"}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group}, "ignore": [endless]}
    write_checkpoint(tmp_path, q.compressed_integers(4), config)
    load_plain(tmp_path)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from(
        ["bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic", "version", "config_groups", "format",
         "weight_block_size", "quant_algo", "load_in_4bit", "transform_config", "w_bit", "q_group_size"]
    ),
    VALUES,
    max_size=5,
)  # fmt: skip
LAYOUTS = [
    ("gptq", q.gptq(4, order="even")),
    ("awq", q.awq()),
    ("compressed-tensors", q.compressed_integers(4, symmetric=False)),
    ("compressed-tensors", q.nvfp4()),
    ("fp8", q.eight_bit_floats(block=(128, 128), name="weight_scale_inv")),
    ("bitsandbytes", q.book_of_four_bits(nested=True)),
    ("bitsandbytes", q.book_of_four_bits("fp4")),
    ("bitsandbytes", q.bitsandbytes_integers),
    ("compressed-tensors", q.eight_bit_integers(symmetric=False, scales="groups")),
    ("compressed-tensors", q.eight_bit_floats(block=(1, 32), exponents=True)),
    ("compressed-tensors", q.mxfp4),
    ("modelopt", q.eight_bit_floats(rows=True)),
    ("gptq", q.gptq(8, symmetric=False)),
]
DTYPES = [torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_file_it_is_loaded_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    method, quantize = data.draw(st.sampled_from(LAYOUTS))

    def damage(tensors: Tensors) -> None:
        for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
            what = data.draw(st.sampled_from(["drop", "cut", "cast", "flat", "bytes", "empty"]))
            tensor = tensors.pop(name)
            if what == "cut":
                tensors[name] = tensor[: data.draw(st.integers(0, 3))] if tensor.dim() else tensor
            elif what == "cast":
                tensors[name] = tensor.float().to(data.draw(st.sampled_from(DTYPES)))
            elif what == "flat":
                tensors[name] = tensor.reshape(-1)
            elif what == "bytes":
                octets = tensor.contiguous().reshape(-1).view(torch.uint8)
                noise = torch.randint(0, 256, octets.shape, dtype=torch.uint8)
                tensors[name] = noise.view(tensor.dtype).reshape(tensor.shape)
            elif what == "empty":
                tensors[name] = tensor.reshape(-1)[:0]

    config = {"quant_method": method, **data.draw(FIELDS)}
    path = damaged(tmp_path, quantize, config, damage)
    with contextlib.suppress(ModelError):
        read_model_facts(ModelConfig(path=str(path)))
        load_compiled(path)
