"""Hugging Face directories, random weights, and what the loader says when files are not what they should be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from engine.config import ModelConfig
from engine.loading.default_model import SMOLLM2
from engine.loading.loader import LoadedModel, load_model, read_model_facts
from engine.models.model_error import ModelError
from engine.models.registry import build_model

torch.set_num_threads(1)

TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=7))


def make_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def directory(tmp_path: Path, original: LlamaForCausalLM) -> Path:
    original.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path | str, **settings: str) -> LoadedModel:
    config = ModelConfig.model_validate({"path": str(path), **settings})
    return load_model(config, dtype=torch.float32, seed=3)


def same_weights(loaded: LoadedModel, original: LlamaForCausalLM) -> bool:
    expected = build_model(original.config, dtype=torch.float32)
    expected.load_weights(original.state_dict().items())
    theirs = dict(expected.named_parameters())
    return all(torch.equal(parameter, theirs[name]) for name, parameter in loaded.model.named_parameters())


def test_a_sharded_directory_comes_back_whole(directory: Path, original: LlamaForCausalLM) -> None:
    assert len(list(directory.glob("*.safetensors"))) > 2
    loaded = load(directory)
    assert same_weights(loaded, original)
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.num_parameters == original.num_parameters()
    assert loaded.trained_context == 128
    assert loaded.eos_token_ids == [7, 257, 258]  # config, tokenizer, and the end of a turn in the template
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    text = "Grüße, 世界!\n  <|im_end|>"
    assert Tokenizer.from_str(loaded.tokenizer.tokenizer_json).encode(text).ids == make_tokenizer()(text).input_ids


def test_a_single_file_is_the_same_model_as_its_shards(original: LlamaForCausalLM, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "single")
    make_tokenizer().save_pretrained(tmp_path / "single")
    assert (tmp_path / "single" / "model.safetensors").is_file()
    assert same_weights(load(tmp_path / "single"), original)


def test_a_checkpoint_is_bfloat16_if_all_that_is_read_of_it_is(original: LlamaForCausalLM, tmp_path: Path) -> None:
    def is_bfloat16(**others: torch.Tensor) -> bool:
        weights = {name: weight.bfloat16() for name, weight in original.state_dict().items()} | others
        original.save_pretrained(tmp_path, state_dict=weights)
        return read_model_facts(ModelConfig(path=str(tmp_path))).is_bfloat16

    assert is_bfloat16()
    assert not read_model_facts(ModelConfig(path=str(tmp_path), load_format="dummy")).is_bfloat16
    assert not is_bfloat16(**{"model.norm.weight": torch.ones(64)})
    assert not is_bfloat16(**{"model.norm.weight": torch.ones(64).half()})


def test_facts_need_no_weights(directory: Path, original: LlamaForCausalLM) -> None:
    for file in directory.glob("*.safetensors"):
        file.unlink()
    facts = read_model_facts(ModelConfig(path=str(directory)))
    assert facts.num_parameters == original.num_parameters()
    assert facts.num_embedding_parameters == 300 * 64
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert facts.num_linear_parameters == 3 * layer + 300 * 64
    assert not facts.ties_output
    assert (facts.vocab_size, facts.hidden_size, facts.widest, facts.trained_context) == (300, 64, 192, 128)
    assert [layer.num_kv_heads for layer in facts.attention_layers] == [2, 2, 2]


def test_generation_defaults_come_from_models_that_sample(directory: Path) -> None:
    path = directory / "generation_config.json"
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    path.write_text(json.dumps({"do_sample": True, "eos_token_id": [9], **sampling}))
    loaded = load(directory)
    assert loaded.generation_defaults == sampling
    assert set(loaded.eos_token_ids) == {7, 9, 257, 258}
    path.write_text(json.dumps({"temperature": 0.6}))
    assert load(directory).generation_defaults == {}
    path.write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load(directory)


def test_a_template_in_a_file_of_its_own_is_found_and_can_be_replaced(directory: Path, tmp_path: Path) -> None:
    (directory / "chat_template.jinja").write_text("from the directory")
    assert load(directory).tokenizer.chat_template == "from the directory"
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine")
    assert load(directory, chat_template=str(mine)).tokenizer.chat_template == "mine"
    with pytest.raises(ModelError, match=r"model\.chat_template.*none\.jinja"):
        load(directory, chat_template=str(tmp_path / "none.jinja"))


def test_another_tokenizer_can_be_named(directory: Path, tmp_path: Path) -> None:
    other = make_tokenizer()
    other.add_tokens(["hello"])
    other.save_pretrained(tmp_path / "other")
    loaded = load(directory, tokenizer=str(tmp_path / "other"))
    assert Tokenizer.from_str(loaded.tokenizer.tokenizer_json).encode("hello").tokens == ["hello"]
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load(directory, tokenizer=str(tmp_path / "nowhere"))


def test_random_weights_need_a_config_only(directory: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((directory / "config.json").read_text())
    one, again = load(bare, load_format="dummy"), load(bare, load_format="dummy")
    other = load_model(ModelConfig(path=str(bare), load_format="dummy"), dtype=torch.float32, seed=4)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))
        assert torch.isfinite(parameter).all()
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other.model.get_parameter(name))
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.1)
    assert one.weights_digest == again.weights_digest != other.weights_digest
    tokenizer = Tokenizer.from_str(one.tokenizer.tokenizer_json)
    assert tokenizer.get_vocab_size() == one.vocab_size == 300
    text = "any bytes: é 漢 🙂 \n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([299]) == "<299>"


def test_random_weights_ignore_the_stored_ones(directory: Path, original: LlamaForCausalLM) -> None:
    assert not same_weights(load(directory, load_format="dummy"), original)


def test_damaged_weight_files_are_model_errors(directory: Path) -> None:
    files, rng = sorted(directory.glob("*.safetensors")), random.Random(0)
    for _ in range(20):
        file = rng.choice(files)
        data = file.read_bytes()
        file.write_bytes(data[: rng.randrange(len(data))])
        with pytest.raises(ModelError, match="download it again"):
            load(directory)
        file.write_bytes(data)
    files[1].unlink()
    with pytest.raises(ModelError, match=files[1].name):
        load(directory)


def test_weights_that_do_not_fit_the_config_are_named(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"layers\.3"):
        load(directory)
    path.write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="unheard_of"):
        load(directory)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(directory)


def test_an_output_layer_in_the_files_is_used_whatever_the_config_says(tmp_path: Path) -> None:
    for kind, config_kind in ((LlamaForCausalLM, LlamaConfig), (Olmo2ForCausalLM, Olmo2Config)):
        directory = tmp_path / kind.__name__
        config = config_kind(**SIZES, tie_word_embeddings=True)
        torch.manual_seed(1)
        kind(config).save_pretrained(directory)
        weights = load_file(directory / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        make_tokenizer().save_pretrained(directory)
        for output, is_own in ((embedding.clone(), False), (torch.randn(300, 64), True), (embedding.clone(), True)):
            if is_own and torch.equal(output, embedding):
                output[299, 63] += 1  # one number is enough
            save_file({**weights, "lm_head.weight": output}, directory / "model.safetensors", {"format": "pt"})
            assert read_model_facts(ModelConfig(path=str(directory))).ties_output is not is_own
            model = load(directory).model
            hidden = torch.eye(64)
            assert torch.equal(model.compute_logits(hidden), (hidden @ output.T)), (kind, is_own)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.qweight"])
def test_weights_that_are_quantised_without_saying_so_are_refused(
    name: str, directory: Path, original: LlamaForCausalLM
) -> None:
    (directory / "model.safetensors.index.json").unlink()
    for file in directory.glob("*.safetensors"):
        file.unlink()
    weights = {key: value.clone() for key, value in original.state_dict().items()}
    weights[name] = weights.pop("model.layers.1.mlp.down_proj.weight").mul(100).to(torch.int8)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    for read in (read_model_facts, lambda config: load(config.path)):
        with pytest.raises(ModelError, match=rf"quantised \({name} is I8\), though its config.json does not say so"):
            read(ModelConfig(path=str(directory)))


def test_an_index_cannot_point_outside_of_its_directory(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="beside it"):
        load(directory)


def test_an_adapter_beside_the_weights_is_ignored_and_said_so(directory: Path, original: LlamaForCausalLM) -> None:
    assert read_model_facts(ModelConfig(path=str(directory))).notes == ()
    save_file({"base_model.model.lora_A.weight": torch.zeros(4, 64)}, directory / "adapter_model.safetensors")
    (note,) = read_model_facts(ModelConfig(path=str(directory))).notes
    assert note.startswith("adapter_model.safetensors lies beside the weights and is ignored")
    assert same_weights(load(directory), original)


def test_a_checkpoint_s_scales_of_an_8_bit_cache_are_not_needed(
    directory: Path, original: LlamaForCausalLM, tmp_path: Path
) -> None:
    names = ("self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.output_scale", "self_attn.v_proj.v_scale")
    scales = {f"model.layers.{layer}.{name}": torch.ones(1) for layer in range(3) for name in names}
    original.save_pretrained(tmp_path / "scaled", state_dict=original.state_dict() | scales)
    make_tokenizer().save_pretrained(tmp_path / "scaled")
    (note,) = read_model_facts(ModelConfig(path=str(tmp_path / "scaled"))).notes
    assert note.startswith("the checkpoint's scales of an 8-bit KV cache are not used")
    assert same_weights(load(tmp_path / "scaled"), original)


def test_an_adapter_alone_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/base", "r": 8}))
    save_file({"base_model.model.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"is an adapter \(LoRA\) of meta/base.*merge_and_unload"):
        load(tmp_path)


def test_pickled_weights_are_never_opened(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelError, match=r"pickles.*safetensors"):
        load(directory)
    with pytest.raises(ModelError, match="pickle"):
        load(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("path", "load_format", "reason"),
    [
        ("/no/such/model", "auto", "there is no /no/such/model"),
        ("./nothing.gguf", "auto", "there is no"),
        ("model", "gguf", "is a directory"),
        ("empty", "auto", r"has no config\.json"),
        ("model/config.json", "auto", r"no \.gguf"),
        ("some-owner/some-model", "auto", "cannot get some-owner/some-model.*network"),
    ],
)
def test_paths_that_hold_no_model_say_why(
    directory: Path, monkeypatch: pytest.MonkeyPatch, path: str, load_format: str, reason: str
) -> None:
    (directory.parent / "empty").mkdir()
    monkeypatch.chdir(directory.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=reason):
        load(path, load_format=load_format)


def test_the_phases_of_a_load_are_reported(directory: Path) -> None:
    phases: list[str] = []
    config = ModelConfig(path=str(directory))
    load_model(config, dtype=torch.bfloat16, seed=0, report=lambda name, _: phases.append(name))
    assert phases == ["config", "weights", "tokenizer"]


def test_the_default_models_pins_are_whole_digests() -> None:
    assert {len(SMOLLM2.sha256), len(SMOLLM2.wheel_sha256)} == {64}


def test_a_tokenizer_whose_ids_reach_beyond_the_embedding_is_refused(directory: Path) -> None:
    """Compiled layers would read whatever lies behind the table."""
    fast = make_tokenizer()
    fast.add_tokens([f"<extra {i}>" for i in range(60)])
    fast.save_pretrained(directory)
    with pytest.raises(
        ModelError, match=r"makes 19 ids .* embedding of 300 rows .*'<extra 41>' is 300.*model.tokenizer"
    ):
        load(directory)


@pytest.mark.parametrize("written_by", [None, "the template", "the tokenizer"])
def test_a_special_token_beyond_the_embedding_is_fine_where_nothing_writes_it(
    tmp_path: Path, written_by: str | None
) -> None:
    fast = make_tokenizer()
    fast.add_tokens(["<image>"], special_tokens=True)
    if written_by == "the template":
        fast.chat_template = "<image>" + TEMPLATE
    if written_by == "the tokenizer":
        fast.eos_token = "<image>"
    fast.save_pretrained(tmp_path)
    num_rows = len(fast) - 1
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": num_rows})).save_pretrained(tmp_path)
    if written_by is None:
        assert load(tmp_path).model.vocab_size == num_rows
    else:
        with pytest.raises(ModelError, match=f"'<image>' is {num_rows}"):
            load(tmp_path)
