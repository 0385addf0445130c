"""A draft model is cut out of its target, learns what that says, and is loaded as any other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig, ModelConfig
from engine.loading.dummy import byte_tokenizer
from engine.models.model_error import ModelError
from engine.training import trainer as trainer_module
from engine.training.draft_data import DraftData, make_draft_data
from engine.training.draft_run import run_draft
from engine.training.draft_trainer import DraftTrainer
from engine.training.pruned_model import PrunedModel, kept_layers, prune
from engine.training.training_job import DraftJob
from engine.training.transcripts import Transcripts
from engine.types import Request, SamplingParams
from tests.support.answers import answer_all

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

VOCAB, HIDDEN, NUM_LAYERS = 60, 32, 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It looks at the newest token alone, through all of its layers: what is cut out has something to learn."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=256, tie_word_embeddings=False,
            eos_token_id=0, bos_token_id=1,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * (0.0 if "o_proj" in name else 0.4)
    for layer in (model.model.layers[1], model.model.layers[2]):
        layer.mlp.down_proj.weight.data *= 2.0
    model.model.layers[1].mlp.down_proj.weight.data *= 0.2  # says next to nothing
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer(VOCAB).tokenizer_json)
    return folder


def config_of(target: Path, **speculation: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "model": {"path": str(target), "dtype": "float32", "quantization": "none"},
            "device": {"kernels": "torch", "num_threads": 1},
            "kv_cache": {"memory": "2048tokens"},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
            "speculation": speculation,
        }
    )


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 40, (5 + i % 7,), generator=generator).tolist() for i in range(count)]


def make_job(target: Path, output: Path, **fields: object) -> DraftJob:
    settings = {
        "engine": config_of(target), "output": output, "kind": "answers", "sequences": prompts(120), "max_tokens": 20,
        "num_tokens": 5000, "num_layers": 2, "num_epochs": 8, "learning_rate": 3e-3,
    }  # fmt: skip
    return DraftJob.model_validate({**settings, **fields})


def test_what_is_written_is_a_draft_model_that_is_often_right(target: Path, tmp_path: Path) -> None:
    untrained = run_draft(make_job(target, tmp_path / "untrained", num_epochs=1, learning_rate=1e-9), lambda text: None)
    said: list[str] = []
    job = make_job(target, tmp_path / "draft")
    trained = run_draft(job, said.append)
    assert trained.num_positions == untrained.num_positions > 50
    assert trained.accepted[0] > untrained.accepted[0] + 0.1
    assert trained.accepted == sorted(trained.accepted, reverse=True)
    assert "tokens a step" in trained.table()
    assert any(line.startswith("teaching 2 layers") for line in said)
    assert run_draft(job, said.append) == trained  # nothing is done twice
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["peregrine_accepted"]) == (2, trained.accepted)
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=prompt,
            params=SamplingParams(seed=i, max_tokens=30, temperature=0.8 if i % 2 else 0.0),
        )
        for i, prompt in enumerate(prompts(130)[120:])
    ]
    alone, _ = build_engine(config_of(target), lambda phase, detail: None)
    drafted, _ = build_engine(
        config_of(target, method="draft_model", model=str(tmp_path / "draft"), depth=4), lambda phase, detail: None
    )
    found = answer_all(drafted, requests)
    assert found.tokens == answer_all(alone, requests).tokens
    assert found.num_accepted_drafts > trained.accepted[0] * 50


def test_texts_are_learned_from_too(target: Path, tmp_path: Path) -> None:
    texts = [prompt * 6 for prompt in prompts(60)]
    accuracy = run_draft(make_job(target, tmp_path, kind="texts", sequences=texts, num_epochs=1), lambda text: None)
    assert accuracy.num_positions > 50
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(("total", "wanted", "kept"), [(30, 1, [0]), (30, 2, [0, 29]), (9, 3, [0, 4, 8])])
def test_the_first_and_the_last_layers_are_kept(total: int, wanted: int, kept: list[int]) -> None:
    assert kept_layers(total, wanted) == kept


def test_kept_layers_are_all_different() -> None:
    for total in range(2, 40):
        for wanted in range(1, total):
            assert len(set(kept_layers(total, wanted))) == wanted


def test_without_a_layer_that_adds_nothing_it_is_the_target(target: Path, tmp_path: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(target).eval()
    idle = whole.model.layers[1]
    for matrix in (idle.self_attn.o_proj, idle.mlp.down_proj):
        matrix.weight.data.zero_()
    whole.save_pretrained(tmp_path)
    pruned = prune(ModelConfig(path=str(tmp_path)), NUM_LAYERS - 1)
    assert kept_layers(NUM_LAYERS, NUM_LAYERS - 1) == [0, 2, 3]
    ids = torch.tensor([prompts(1)[0]])
    with torch.inference_mode():
        expected = whole.model(ids).last_hidden_state
        torch.testing.assert_close(pruned(ids), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(pruned.output, whole.lm_head.weight)


def _data(target: Path) -> tuple[PrunedModel, DraftData]:
    pruned = prune(ModelConfig(path=str(target)), 1)
    generator = torch.Generator().manual_seed(1)
    sequences = prompts(80)
    lengths = torch.full((80,), 12)
    states = torch.randn(80 * 12, HIDDEN, generator=generator)
    tokens = (states @ pruned.output.T).argmax(1).int()
    transcripts = Transcripts(torch.arange(80), lengths, tokens, states.half())
    return pruned, make_draft_data(transcripts, sequences, torch.arange(VOCAB), pruned.output, are_answers=True)


def test_each_place_of_a_text_is_where_its_token_is_said_from(target: Path) -> None:
    _, data = _data(target)
    batch = data.batch(torch.tensor([3, 7]))
    for text, number in ((0, 3), (1, 7)):
        own = batch.texts == text
        prefix = prompts(8)[number]
        assert batch.columns[own].tolist() == list(range(len(prefix) - 1, len(prefix) + 11))
        whole = [*prefix, *data.tokens[number * 12 : number * 12 + 12].tolist()]
        assert batch.token_ids[text, : len(whole)].tolist() == whole
        following = batch.token_ids[text, batch.columns[own] + 1]
        assert batch.targets[own].tolist() == following.tolist()
    assert data.known[batch.label_rows[:, 0]].tolist() == batch.targets.tolist()


def test_an_interrupted_training_ends_as_any_other(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"batch_size": 8, "num_epochs": 2, "learning_rate": 1e-3, "seed": 1}
    whole, data = _data(target)
    DraftTrainer(whole, data, **sizes).train(tmp_path / "whole.pt")
    monkeypatch.setattr(trainer_module, "_SAVE_INTERVAL", 0.0)
    begun, data = _data(target)
    trainer = DraftTrainer(begun, data, **sizes)
    learn, steps = trainer._learn, []

    def learn_until_killed(items: torch.Tensor) -> float:
        steps.append(items)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return learn(items)

    monkeypatch.setattr(trainer, "_learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path / "state.pt")
    resumed, data = _data(target)
    DraftTrainer(resumed, data, **sizes).train(tmp_path / "state.pt")
    before, _ = _data(target)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    assert torch.equal(before.output, resumed.output)  # which the draft model shares with its target


def test_what_cannot_be_cut_is_said(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 4 layers, so a draft model may keep 1 to 3, not 4"):
        prune(ModelConfig(path=str(target)), 4)
    with pytest.raises(ModelError, match="load_format is dummy"):
        prune(ModelConfig(path=str(target), load_format="dummy"), 1)
    config = json.loads((target / "config.json").read_text())
    for file in target.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"family gemma, .* train heads, without --draft"):
        prune(ModelConfig(path=str(tmp_path)), 1)
