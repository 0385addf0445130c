"""A step that failed can be run again from a file, with no sequence around it."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from engine import replay
from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_file import StepFile, without_contents
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.state_directory import keep_running_step
from engine.runner.step_builder import StepBuilder
from engine.runner.step_recording import StepRecording
from engine.types import Request, SamplingParams, Scheduled, Sequence

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
SECRET = 61  # a token that no file of shapes may hold


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=128)).save_pretrained(tmp_path / "model")
    Tokenizer(tokenizer_models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "model" / "tokenizer.json"))
    return EngineConfig.model_validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "device": {"num_threads": 1},
            "kv_cache": {"memory": "1000tokens"},
            "supervision": {"record_steps": "contents"},
        }
    )


def _engine(config: EngineConfig) -> Engine:
    engine, _ = build_engine(config, lambda phase, detail: None)
    for number in range(3):
        params = SamplingParams(seed=number, max_tokens=20, frequency_penalty=0.5 * number, logit_bias={SECRET: 1.0})
        prompt = [(7 * number + i) % 64 for i in range(20 + number)]
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    return engine


def _fail_once(engine: Engine) -> None:
    """The next forward pass raises an error, and those after it do not."""
    runner = engine.executor.runner
    forward = runner.forward

    def fail(*arguments: object) -> object:
        runner.forward = forward
        raise RuntimeError("on order")

    runner.forward = fail


def _recorded(config: EngineConfig) -> list[Path]:
    return sorted(Path(config.model.path).parent.glob("state/peregrine/steps/*.step"))


@pytest.mark.parametrize("num_steps", [0, 5])
def test_a_step_that_failed_runs_again_from_its_file(num_steps: int, config: EngineConfig, capsys) -> None:
    engine = _engine(config)
    for _ in range(num_steps):
        engine.step()
    assert _recorded(config) == []  # steps that end leave nothing
    _fail_once(engine)
    engine.step()
    (path,) = _recorded(config)
    assert path.stat().st_mode & 0o077 == 0
    assert replay.main([str(path), "--times", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("3 tokens for 3 sequences") == 2
    assert f"of {20 + num_steps}" in out


def test_a_file_of_shapes_holds_no_token(config: EngineConfig) -> None:
    rng = random.Random(0)
    batch = []
    for number in range(3):
        params = SamplingParams(
            seed=1,
            max_tokens=9,
            logit_bias={SECRET: 2.0},
            bad_words=[[SECRET], [SECRET, SECRET]],
            repetition_penalty=1.2,
            prompt_logprobs=2 if number == 0 else None,
            allowed_token_ids=[SECRET, 3],
        )
        prompt = [SECRET] * rng.randrange(3, 30)
        seq = Sequence(Request(request_id="a", prompt_token_ids=prompt, params=params), prompt)
        seq.block_tables = [[1, 2]]
        num_drafts = 2 * (number == 2)
        seq.draft_token_ids, seq.draft_parents = [SECRET] * num_drafts, [-1, 0][:num_drafts]
        num_scored = len(prompt) - 1 if number == 0 else 0
        batch.append(Scheduled(seq, len(prompt) + num_drafts, num_drafts, True, num_scored))
    for counts_on_device in (False, True):
        inputs = StepBuilder(16, 64, counts_on_device=counts_on_device).build(batch)
        assert _holds(inputs, SECRET)
        assert not _holds(without_contents(inputs), SECRET)


def test_a_recorded_step_asks_for_what_the_step_itself_asks_for() -> None:
    """Tables of each group and the hidden states of all rows, told as to an executor that was told nothing."""
    params = SamplingParams(seed=0, max_tokens=1)
    seq = Sequence(Request(request_id="a", prompt_token_ids=[1] * 5, params=params), [1] * 5)
    seq.block_tables, seq.num_released_blocks = [[1], [2]], [0, 0]
    builder, batch = StepBuilder(16, 64, num_groups=2, shows_all_rows=True), [Scheduled(seq, 5, 0, samples=True)]
    first = builder.build(batch)
    builder.launched()
    assert not len(builder.build(batch).table_changes.entries)
    recorded = builder.fresh().build(batch)
    assert recorded.table_changes.entries.tolist() == first.table_changes.entries.tolist()
    assert recorded.hidden_rows is not None
    assert recorded.hidden_rows.tolist() == [0, 1, 2, 3, 4]


def _holds(value: object, token: int) -> bool:
    """Whether any array of token ids says it. Lengths and slots may be that number by chance: these are named."""
    if is_dataclass(value):
        shapes = {"positions", "slots", "query_starts", "seq_lens", "logits_rows", "table_changes", "table_rows"}
        return any(_holds(getattr(value, field.name), token) for field in fields(value) if field.name not in shapes)
    if isinstance(value, tuple):
        return any(_holds(one, token) for one in value)
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        return value.ndim == 1 and len(value) == 64  # the allowed tokens
    return isinstance(value, np.ndarray) and token in value


def test_a_file_says_what_was_written(config: EngineConfig, tmp_path: Path) -> None:
    engine = _engine(config)
    inputs = engine.builder.build(engine.scheduler.schedule())
    words = np.array([[7, 0], [1 << 31, 5]], dtype=np.uint32)
    masks = GrammarMasks(np.array([0, 2]), words)
    inputs = replace(inputs, sampling=replace(inputs.sampling, masks=masks))
    StepFile(config_json="{}", has_contents=True, inputs=inputs).write(tmp_path / "a.step")
    found = StepFile.read(tmp_path / "a.step").inputs
    assert found.input_ids.tolist() == inputs.input_ids.tolist()
    assert found.table_changes.entries.tolist() == inputs.table_changes.entries.tolist()
    assert found.sampling.facts.seeds.tolist() == inputs.sampling.facts.seeds.tolist()
    assert found.sampling.edits[0].tokens.biased.tolist() == [SECRET]
    assert found.tree_mask is None
    assert found.sampling.masks is not None
    assert found.sampling.masks.rows.tolist() == [0, 2]
    assert found.sampling.masks.words().tolist() == words.tolist()
    hidden = without_contents(found).sampling.masks
    assert hidden is not None
    assert (hidden.words() == 2**32 - 1).all()


def test_what_cannot_be_run_again_is_a_sentence(config: EngineConfig, tmp_path: Path, capsys) -> None:
    (tmp_path / "b.step").write_bytes(b"no such thing")
    assert replay.main([str(tmp_path / "b.step")]) == 2
    assert replay.main([str(tmp_path / "missing.step")]) == 2
    errors = capsys.readouterr().err
    assert "is not a recorded step" in errors
    assert "missing.step cannot be run again" in errors


def test_every_step_that_fails_has_a_file_of_its_own(config: EngineConfig) -> None:
    """However fast they fail: a step of several requests, then each of them alone."""
    engine, recording = _engine(config), StepRecording(config)
    batch = engine.scheduler.schedule()
    for items in (batch, batch[:1], batch[1:2]):
        recording.begin(items, engine.builder)
        recording.keep()
    kept = [StepFile.read(path).inputs for path in _recorded(config)]
    assert sorted(inputs.num_seqs for inputs in kept) == [1, 1, 3]


def test_a_file_that_cannot_be_removed_costs_no_step(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError("read-only file system")

    engine = _engine(config)
    monkeypatch.setattr(Path, "unlink", fail)
    outputs, _, _ = engine.step()
    assert [output.error for output in outputs] == [None] * 3
    (left,) = _recorded(config)  # no later step is recorded
    written_at = left.stat().st_mtime_ns
    engine.step()
    assert left.stat().st_mtime_ns == written_at


def test_the_file_of_a_process_that_died_is_kept_under_another_name(config: EngineConfig) -> None:
    engine = _engine(config)
    assert engine.recording is not None
    engine.recording.begin(engine.scheduler.schedule(), engine.builder)  # and then the process is no more
    (left,) = _recorded(config)
    kept = keep_running_step(int(left.stem))
    assert kept is not None
    assert kept != left
    assert _recorded(config) == [kept]
    assert keep_running_step(int(left.stem)) is None
