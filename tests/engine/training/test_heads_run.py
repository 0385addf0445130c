"""The whole training, on a model of random weights: what it answers, its states, and heads that can be read."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.models.model import Model
from engine.speculation.medusa_heads import MedusaHeads
from engine.training import collector as collector_module
from engine.training.collector import Collector
from engine.training.heads_run import Target, run
from engine.training.training_job import HeadsJob
from engine.training.transcripts import Transcript, TranscriptFolder
from tests import ROOT

VOCAB, HIDDEN = 60, 32


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    folder = tmp_path / "model"
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, max_position_embeddings=128, architectures=["LlamaForCausalLM"], eos_token_id=0,
        bos_token_id=1,
    ).save_pretrained(folder)  # fmt: skip
    return EngineConfig.model_validate(
        {
            "model": {"path": str(folder), "load_format": "dummy", "dtype": "float32", "quantization": "none"},
            "device": {"kernels": "torch", "num_threads": 1},
            "kv_cache": {"memory": "2048tokens"},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
        }
    )


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, VOCAB, (5 + i % 7,), generator=generator).tolist() for i in range(count)]


def built(config: EngineConfig) -> tuple[Collector, Model]:
    engine, model = build_engine(config, lambda phase, detail: None)
    decoder = engine.executor.runner.model
    collector = Collector(engine, hidden_size=HIDDEN, max_model_len=model.max_model_len, num_at_once=4)
    return collector, decoder


def check_states(transcripts: Iterator[Transcript], decoder: Model, *, only_greedy: bool) -> int:
    """That each greedy token is the likeliest one of its state; how many were looked at."""
    count = 0
    for transcript in transcripts:
        assert transcript.states.shape == (len(transcript.tokens), HIDDEN)
        if transcript.index % 2 == 0 or not only_greedy:
            logits = decoder.compute_logits(transcript.states.float())
            chosen = logits.gather(1, transcript.tokens.long()[:, None])[:, 0]
            assert float((logits.amax(1) - chosen).max()) < 0.02
            count += len(transcript.tokens)
    return count


def test_answers_come_with_the_states_that_they_were_sampled_from(config: EngineConfig) -> None:
    collector, decoder = built(config)
    with torch.inference_mode():
        answers = list(collector.answers(iter(enumerate(prompts(10))), eos_token_ids=[0], max_tokens=9))
        assert sorted(answer.index for answer in answers) == list(range(10))
        for answer in answers:
            assert len(answer.tokens) == 9 or int(answer.tokens[-1]) == 0
            assert 0 not in answer.tokens[:-1].tolist()
        assert check_states(iter(answers), decoder, only_greedy=True) > 20


def test_an_answer_ends_with_its_end_of_sequence(config: EngineConfig) -> None:
    collector, decoder = built(config)
    with torch.inference_mode():
        [whole] = collector.answers(iter([(0, [1, 2, 3])]), eos_token_ids=[], max_tokens=9)
        end = int(whole.tokens[4])
        [ended] = collector.answers(iter([(0, [1, 2, 3])]), eos_token_ids=[end], max_tokens=9)
        first = whole.tokens.tolist().index(end)
        assert ended.tokens.tolist() == whole.tokens.tolist()[: first + 1]
        assert check_states(iter([ended]), decoder, only_greedy=True) == first + 1


def test_prompts_that_leave_no_room_are_left_out(config: EngineConfig) -> None:
    collector, _ = built(config)
    with torch.inference_mode():
        found = collector.answers(iter(enumerate([[1] * 120, [2] * 5])), eos_token_ids=[], max_tokens=9)
        assert [answer.index for answer in found] == [1]


def test_texts_are_read_with_the_state_before_each_token(config: EngineConfig) -> None:
    collector, _ = built(config)
    with torch.inference_mode():
        [answer] = collector.answers(iter([(0, [1, 2, 3])]), eos_token_ids=[], max_tokens=80)
        text = [1, 2, 3, *answer.tokens.tolist()]
        [read] = collector.texts(iter([(7, text)]))  # two chunks: a step has 64 tokens
        assert (read.index, read.tokens.tolist()) == (7, text[1:])
        torch.testing.assert_close(read.states[2:], answer.states, atol=0.01, rtol=0.01)
        short = list(collector.texts(iter([(0, [5]), (1, [5, 6])])))
        assert [text.tokens.tolist() for text in short] == [[6]]


@pytest.mark.parametrize(("kernels", "dtype"), [("torch", "float32"), ("torch", "bfloat16"), ("numba", "float32")])
def test_rows_of_the_output_matrix_are_found_through_logits(config: EngineConfig, kernels: str, dtype: str) -> None:
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    _, on_torch = built(config)
    weight = on_torch.lm_head.dense().float()
    device = config.device.model_copy(update={"kernels": kernels})
    _, decoder = built(config.model_copy(update={"device": device}))
    target = Target(HIDDEN, VOCAB, decoder, getattr(torch, dtype))
    for _ in range(2):  # the first product makes what the second one writes to
        torch.testing.assert_close(target.output_rows(None), weight)
        torch.testing.assert_close(target.output_rows(torch.tensor([4, 2])), weight[[4, 2]])


def make_job(config: EngineConfig, output: Path, **fields: object) -> HeadsJob:
    settings = {
        "engine": config, "output": output, "kind": "answers", "sequences": prompts(60), "max_tokens": 20,
        "num_tokens": 5000, "num_heads": 2, "num_known_tokens": 50, "markov_rank": 4, "num_epochs": 2, "batch_size": 64,
    }  # fmt: skip
    return HeadsJob.model_validate({**settings, **fields})


@pytest.mark.parametrize("kind", ["answers", "texts"])
def test_a_training_leaves_heads_that_can_be_read(config: EngineConfig, tmp_path: Path, kind: str) -> None:
    texts = [prompt * 6 for prompt in prompts(60)]
    job = make_job(config, tmp_path / "heads", kind=kind, sequences=prompts(60) if kind == "answers" else texts)
    said: list[str] = []
    accuracy = run(job, said.append)
    heads = MedusaHeads.load(
        tmp_path / "heads", hidden_size=HIDDEN, vocab_size=VOCAB, output_rows=lambda ids: torch.zeros(len(ids), HIDDEN)
    )
    assert (heads.num_heads, heads.num_known_tokens, heads.has_correction) == (2, 50, True)
    assert [list(row) for row in heads.accuracies] == accuracy.by_rank
    assert any("learning from" in line for line in said)
    files = TranscriptFolder(job.data).files()
    times = [file.stat().st_mtime_ns for file in files]
    assert run(job, said.append).by_rank == accuracy.by_rank  # nothing is done twice
    assert [file.stat().st_mtime_ns for file in TranscriptFolder(job.data).files()] == times


def test_too_little_to_learn_from_is_said(config: EngineConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few to learn from"):
        run(make_job(config, tmp_path / "heads", sequences=prompts(3)), lambda text: None)


def test_a_killed_training_goes_on_with_what_it_had(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = make_job(config, tmp_path / "heads", sequences=prompts(4000), num_tokens=10**6)
    command = [sys.executable, "-m", "engine.training", str(many.write())]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 90
        while not TranscriptFolder(many.data).files():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    kept = TranscriptFolder(many.data).indices()
    assert kept
    asked: list[int] = []
    monkeypatch.setattr(collector_module, "sampling_of", _noting(collector_module.sampling_of, asked))
    num_tokens = TranscriptFolder(many.data).num_tokens() + 500
    assert run(many.model_copy(update={"num_tokens": num_tokens}), lambda text: None).num_positions > 0
    assert asked
    assert not kept & set(asked)


def _noting(sampling: object, asked: list[int]) -> object:
    def note(index: int, max_tokens: int) -> object:
        asked.append(index)
        return sampling(index, max_tokens)

    return note


def test_the_folder_of_another_job_is_refused(config: EngineConfig, tmp_path: Path) -> None:
    make_job(config, tmp_path / "heads").write()
    make_job(config, tmp_path / "heads").write()
    with pytest.raises(ValueError, match="work of another training; give another --output"):
        make_job(config, tmp_path / "heads", num_epochs=3).write()
