"""Checkpoints that are written quantised: every weight as it was rounded, and all that lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, Qwen3MoeConfig

from engine.compression.checkpoint_job import Budget, QuantizeJob, describe
from engine.compression.matrix_rounding import rounded_floats
from engine.compression.plain_checkpoint import open_plain_checkpoint
from engine.compression.sensitivity import Sensitivities
from engine.compression.weight_scheme import WeightScheme
from engine.config import ModelConfig
from engine.models.model_error import ModelError
from tests.support.gguf_files import make_model, state_of, write_gguf
from tests.support.loaded_models import load_compiled, load_plain, weights_of
from tests.support.quantized_files import config_fields, float_state, write_checkpoint, write_floats

SCHEMES = {
    "int4": WeightScheme(4, 64),
    "int4, zero points": WeightScheme(4, 32, is_symmetric=False, observer="mse"),
    "int8": WeightScheme(8, 128),
    "int8, a scale for each output": WeightScheme(8),
    "int6": WeightScheme(6, 32),
    "fp8": WeightScheme(8, is_float=True),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_floats(folder, {name: tensor.bfloat16() for name, tensor in float_state(config_fields()).items()})
    return folder


def job(model: Path, output: Path, scheme: WeightScheme | None, **fields: object) -> QuantizeJob:
    return QuantizeJob(model=ModelConfig(path=str(model)), output=output, scheme=scheme, **fields)


def expected(model: Path, schemes: Mapping[str, WeightScheme]) -> dict[str, Tensor]:
    """schemes: by a part of the names of what is quantised"""
    with safe_open(model / "model.safetensors", "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    for name, weight in found.items():
        scheme = next((one for key, one in schemes.items() if key in name), None)
        if scheme is not None and scheme.is_float:
            scales = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16().float()
            found[name] = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales
        elif scheme is not None:
            found[name] = rounded_floats(weight, scheme, scales="BF16")
    return {name: tensor.float() for name, tensor in found.items()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor), name


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_served_with_every_weight_as_it_was_rounded(name: str, model: Path, tmp_path: Path) -> None:
    scheme, output = SCHEMES[name], tmp_path / "output"
    written = job(model, output, scheme).run()
    wanted = expected(model, {"_proj": scheme})
    assert_same(weights_of(load_plain(output)), wanted)
    if not scheme.is_float:
        assert_same(weights_of(load_compiled(output)), wanted)
    assert written.bytes_after <= sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert len(written.schemes) == 14
    assert scheme.label in describe(written)


def test_files_beside_the_weights_come_along(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    (model / "LICENSE").write_text("free")
    (model / "pytorch_model.bin").write_bytes(b"old")
    (model / "onnx").mkdir()
    (tmp_path / "template").write_text("{{ messages }}")
    (model / "chat_template.jinja").symlink_to(tmp_path / "template")
    job(model, tmp_path / "output", SCHEMES["int4"]).run()
    assert {file.name for file in (tmp_path / "output").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "LICENSE", "chat_template.jinja",
    }  # fmt: skip
    assert not (tmp_path / "output" / "chat_template.jinja").is_symlink()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "output"))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


def test_large_checkpoints_are_cut_into_files_with_an_index(model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    job(model, whole, SCHEMES["int4"]).run()
    cut = tmp_path / "cut"
    job(model, cut, SCHEMES["int4"], max_file_bytes=60_000).run()
    files = sorted(file.name for file in cut.glob("*.safetensors"))
    assert len(files) > 4
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same(weights_of(load_plain(cut)), weights_of(load_plain(whole)))


def test_a_model_in_several_files_is_read_file_by_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, {}, None, dtype=torch.bfloat16, max_bytes=50_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    job(source, tmp_path / "output", SCHEMES["int8"]).run()
    single = tmp_path / "single"
    write_checkpoint(single, {}, None, dtype=torch.bfloat16)
    assert_same(weights_of(load_plain(tmp_path / "output")), expected(single, {"_proj": SCHEMES["int8"]}))


def test_rows_that_are_not_made_of_the_groups_get_smaller_ones(tmp_path: Path) -> None:
    model = tmp_path / "model"
    changes = {"hidden_size": 96, "intermediate_size": 320}
    write_checkpoint(model, {}, None, dtype=torch.bfloat16, changes=changes)
    job(model, tmp_path / "output", WeightScheme(4, 128)).run()
    wanted = {"o_proj": WeightScheme(4, 128), "down_proj": WeightScheme(4, 64), "_proj": WeightScheme(4, 32)}
    assert_same(weights_of(load_plain(tmp_path / "output")), expected(model, wanted))
    config = json.loads((tmp_path / "output" / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["group_size"]: group["targets"] for group in config["config_groups"].values()}
    assert groups[64] == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    assert len(groups[32]) == 5
    assert config["format"] == "pack-quantized"


def test_a_gguf_file_becomes_a_directory_with_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", state_of(make_model("llama", tied=True)))
    for name, scheme in (("plain", None), ("int4", SCHEMES["int4"])):
        written = job(file, tmp_path / name, scheme).run()
        assert (written.num_quantized > 0) == (scheme is not None)
    plain = load_plain(tmp_path / "plain")
    assert_same(weights_of(plain), {n: t.bfloat16().float() for n, t in weights_of(load_plain(file)).items()})
    assert (tmp_path / "int4" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


def test_each_expert_is_quantised_and_no_router(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    plain = open_plain_checkpoint(ModelConfig(path=str(model)))
    experts = [name for name in plain.matrices if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert len(plain.matrices) == len(experts) + 2 * 4
    assert "model.layers.0.mlp.gate" in plain.ignored_modules
    assert {plain.matrices[name].unit for name in experts if ".1." in name and "up_proj" in name} == {
        "model.layers.1.mlp.experts.gate_proj", "model.layers.0.mlp.experts.gate_proj",
    }  # fmt: skip


def test_layers_of_transformers_are_found_by_their_names(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    plain = open_plain_checkpoint(ModelConfig(path=str(model)))
    kinds = {name.rpartition("layers.")[2].partition(".")[2] for name in plain.matrices}
    assert kinds == {
        "attention.query_key_value.weight", "attention.dense.weight", "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    }  # fmt: skip


TEXT = [[(7 * i + j * j) % 320 for j in range(24)] for i in range(3)]


def test_bits_are_spent_where_they_change_most(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    scheme = WeightScheme(4, 32, observer="mse")
    sizes = {}
    for bits in (4.6, 6.0, 8.6):
        output = tmp_path / str(bits)
        written = job(model, output, scheme, sequences=TEXT, bits=(4, 6, 8), budget=Budget(bits=bits)).run()
        assert written.bits is not None
        assert written.bits <= bits
        sizes[bits] = {one.bits for one in written.schemes.values()}
        for layer in range(2):  # what is one product has one format
            place = f"model.layers.{layer}.self_attn"
            assert len({written.schemes[f"{place}.{name}_proj"] for name in "qkv"}) == 1
        schemes = {f"{name}.weight": one for name, one in written.schemes.items()}
        assert_same(weights_of(load_compiled(output)), expected(model, schemes))
    assert sizes[8.6] == {8}
    assert len(sizes[6.0]) > 1


def test_the_layer_that_matters_most_keeps_most_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose outputs are a hundred times as large as what other layers add."""
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    state = float_state(config_fields())
    for quiet in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
        state[f"model.layers.{quiet}.weight"] *= 0.1
    state["model.layers.1.mlp.down_proj.weight"] *= 10
    loud = tmp_path / "loud"
    write_floats(loud, {name: tensor.bfloat16() for name, tensor in state.items()})
    scheme = WeightScheme(4, 32)
    written = job(loud, tmp_path / "output", scheme, sequences=TEXT, bits=(4, 8), budget=Budget(bits=5.1)).run()
    assert written.schemes["model.layers.1.mlp.down_proj"].bits == 8
    assert sum(one.bits == 4 for one in written.schemes.values()) > 7


def test_measuring_goes_on_where_it_was_interrupted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    make = Sensitivities._measure
    measured: list[str] = []

    def stop_after_three(self, model, names, *arguments):
        for name, losses in make(self, model, names, *arguments):
            measured.append(name)
            yield name, losses
            if len(measured) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Sensitivities, "_measure", stop_after_three)
    fields = {"sequences": TEXT, "bits": (4, 8), "budget": Budget(bits=6)}
    with pytest.raises(KeyboardInterrupt):
        job(model, tmp_path / "output", WeightScheme(4, 32), **fields).run()
    assert not (tmp_path / "output").exists()
    job(model, tmp_path / "output", WeightScheme(4, 32), **fields).run()
    assert len(measured) == len(set(measured)) == 8
    job(model, tmp_path / "again", WeightScheme(4, 32), **fields | {"budget": Budget(bits=5)}).run()
    assert len(measured) == 8


def test_a_pass_from_the_middle_says_what_a_whole_one_does(model: Path) -> None:
    from engine.compression.sensitivity import ReferencePass, load_reference

    reference = load_reference(open_plain_checkpoint(ModelConfig(path=str(model))))
    with torch.no_grad():
        one = ReferencePass(reference, torch.tensor([TEXT[0]]))
        assert one._layers is not None
        assert one.divergence(1) == pytest.approx(0, abs=1e-9)
        reference.model.layers[1].mlp.down_proj.weight += 0.1
        assert one.divergence(1) == pytest.approx(one.divergence(0), rel=1e-3)
        assert one.divergence(0) > 1e-3


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        (Budget(bits=4.0), r"less than the 4\.5\d bits that the fewest take"),
        (Budget(num_bytes=1000), "GiB that the fewest bits take"),
    ],
)
def test_a_budget_that_is_too_small_is_said_with_the_least(
    budget: Budget, complaint: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=complaint):
        job(model, tmp_path / "output", WeightScheme(4, 32), sequences=TEXT, bits=(4, 8), budget=budget).run()


def test_a_size_is_that_of_the_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    budget = 430_000
    job(
        model, tmp_path / "output", WeightScheme(4, 32), sequences=TEXT, bits=(4, 6, 8),
        budget=Budget(num_bytes=budget),
    ).run()  # fmt: skip
    size = (tmp_path / "output" / "model.safetensors").stat().st_size
    assert 0.9 * budget < size <= budget


def test_what_is_there_is_never_written_over(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "file").write_text("mine")
    with pytest.raises(ModelError, match="is there already"):
        job(model, output, SCHEMES["int4"]).run()
    assert [file.name for file in output.iterdir()] == ["file"]
    (output / "file").unlink()
    job(model, output, SCHEMES["int4"]).run()  # an empty folder is as good as none


def test_nothing_is_left_of_what_fails(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    state = float_state(config_fields())
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    write_floats(broken, state)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj cannot be rounded: .* infinite"):
        job(broken, tmp_path / "output", SCHEMES["int4"]).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model"]


def test_leftovers_of_a_killed_process_are_removed(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".output.partial"
    (partial / "work").mkdir(parents=True)
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    job(model, tmp_path / "output", SCHEMES["int4"]).run()
    assert not partial.exists()
    assert [file.name for file in (tmp_path / "output").glob("*.safetensors")] == ["model.safetensors"]


def test_two_processes_do_not_write_the_same_folder(model: Path, tmp_path: Path) -> None:
    from engine.compression.output_folder import new_folder

    with new_folder(tmp_path / "output"), pytest.raises(ModelError, match="another process is writing"):
        job(model, tmp_path / "output", SCHEMES["int4"]).run()


def test_a_disk_without_room_is_said_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"its disk has 0\.0 GB free"):
        job(model, tmp_path / "output", SCHEMES["int4"]).run()
    assert not (tmp_path / "output").exists()


def test_what_is_quantised_already_is_refused(model: Path, tmp_path: Path) -> None:
    job(model, tmp_path / "once", SCHEMES["int4"]).run()
    with pytest.raises(ModelError, match="quantised already"):
        job(tmp_path / "once", tmp_path / "twice", SCHEMES["int4"]).run()


def test_gptq_without_its_environment_says_how_to_get_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="add --make-environment to make it in"):
        replace(job(model, tmp_path / "output", SCHEMES["int4"], sequences=TEXT), method="gptq").run()


def test_a_tied_output_layer_stays_what_the_embedding_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "named")
    from tests.support.quantized_files import write_tokenizer

    write_tokenizer(tmp_path / "named")
    job(tmp_path / "named", tmp_path / "output", SCHEMES["int4"]).run()
    fields = json.loads((tmp_path / "output" / "config.json").read_text())
    assert fields["quantization_config"]["ignore"] == ["lm_head"]
    weights = weights_of(load_plain(tmp_path / "output"))
    assert torch.equal(
        weights["model.embed_tokens.weight"], weights_of(load_plain(tmp_path / "named"))["model.embed_tokens.weight"]
    )
