"""The law of speculation on compiled layers, where a row's numbers depend on the row alone: equal to the last bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import read_model_facts
from engine.planning.engine_plan import MemoryPlan, plan_memory, render_plan
from engine.planning.machine import read_machine
from engine.runner.executor import ModelExecutor
from engine.runner.strict_runner import OneTokenRunner
from engine.types import Request, SamplingParams
from tests.support.answers import Answer, answer_all
from tests.support.eagle_files import official, random_eagle, vllm, write

VOCAB_SIZE, HIDDEN_SIZE = 50, 32
METHODS: dict[str, dict[str, object]] = {
    "ngram": {"method": "ngram", "ngram_min": 1, "depth": 4},
    "suffix": {"method": "suffix", "depth": 5},
    "draft_model": {"method": "draft_model", "model": "DRAFT", "depth": 3},
    "another draft model": {"method": "draft_model", "model": "OTHER", "depth": 3},
    "medusa": {"method": "medusa", "model": "HEADS", "depth": 8},
    "eagle3": {"method": "eagle3", "model": "EAGLE", "depth": 4},
    "p_eagle": {"method": "eagle", "model": "P-EAGLE", "depth": 3},
    "auto": {"method": "draft_model", "model": "DRAFT"},
    "auto eagle3": {"method": "eagle3", "model": "EAGLE"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target; the same once more, as a draft model; another one, with fewer layers; random heads of each kind."""
    root = tmp_path_factory.mktemp("speculation")
    for name, num_layers in (("TARGET", 2), ("DRAFT", 2), ("OTHER", 1)):
        LlamaConfig(
            hidden_size=HIDDEN_SIZE,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=256,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    heads = {
        f"blocks.{head}.layers.0.weight": torch.randn(HIDDEN_SIZE, HIDDEN_SIZE, generator=generator) * 0.2
        for head in range(3)
    }
    (root / "HEADS").mkdir()
    save_file(heads, root / "HEADS" / "model.safetensors")
    config = {"hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE, "num_heads": 3, "original_lm_head": True}
    (root / "HEADS" / "config.json").write_text(json.dumps(config))
    known = tuple(range(1, VOCAB_SIZE, 2))
    write(root / "EAGLE", *official(random_eagle(aux=(1, 0), vocab=VOCAB_SIZE, known=known)))
    write(root / "P-EAGLE", *vllm(random_eagle(aux=(0, 1), vocab=VOCAB_SIZE, known=None, num_layers=2, mask_token=7)))
    return root


def _build(
    folder: Path,
    speculation: dict[str, object],
    *,
    tokens: int = 4000,
    target: str = "TARGET",
    kernels: str = "numba",
    determinism: str = "fast",
    kept: str = "auto",
) -> Engine:
    named = dict(speculation)
    if "model" in named:
        named["model"] = str(folder / str(named["model"]))
    settings = {
        "model": {"path": str(folder / target), "load_format": "dummy"},
        "device": {"num_threads": 2, "kernels": kernels, "determinism": determinism},
        "kv_cache": {"memory": f"{tokens}tokens", "dtype": kept},
        "scheduler": {"max_num_seqs": 16, "max_num_batched_tokens": 40},
        "speculation": named,
    }
    return build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)[0]


def _requests(temperature: float) -> list[Request]:
    rng = random.Random(4)
    requests = []
    for i in range(16):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(2, 30))]
        prompt = list(range(1, 34)) + own if i % 3 == 0 else own * 2
        params = SamplingParams(
            seed=i, max_tokens=5 + 2 * i, temperature=temperature, logprobs=2, prompt_logprobs=1 if i % 5 == 0 else None
        )
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return requests


@pytest.fixture(scope="module", params=[0.0, 0.8])
def expected(request: pytest.FixtureRequest, folder: Path) -> tuple[float, dict[str, Answer]]:
    """Each request alone, without drafts."""
    engine = _build(folder, {"method": "none"})
    found: dict[str, Answer] = {}
    for one in _requests(request.param):
        found |= answer_all(engine, [one]).answers
    return request.param, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [4000, 256])
def test_tokens_and_log_probabilities_are_the_same_bits(
    folder: Path, expected: tuple[float, dict[str, Answer]], method: str, tokens: int
) -> None:
    temperature, answers = expected
    engine = _build(folder, METHODS[method], tokens=tokens)
    requests = _requests(temperature)
    for at_once in (3, 16):  # the second time, prefixes are warm
        found = answer_all(engine, requests, at_once=at_once)
        assert found.answers == answers
        if method == "draft_model":
            assert found.num_accepted_drafts > 100
    for one in requests[:4]:  # and alone
        assert answer_all(engine, [one]).answers == {one.request_id: answers[one.request_id]}
    assert not engine.speculator.is_off
    assert engine.scheduler.kv.pool.num_owned == 0


@pytest.mark.parametrize("method", ["ngram", "draft_model", "medusa", "eagle3", "p_eagle"])
def test_keys_and_values_in_8_bits_are_the_same_bits_with_drafts_and_without(folder: Path, method: str) -> None:
    """A tree's accepted path is moved with its scales; an EAGLE head's own rows stay in float32 beside the blocks."""
    requests = _requests(0.8)
    plain = _build(folder, {"method": "none"}, kept="int8")
    alone: dict[str, Answer] = {}
    for one in requests:
        alone |= answer_all(plain, [one]).answers
    for tokens in (4000, 256):  # and with preemption
        engine = _build(folder, METHODS[method], tokens=tokens, kept="int8")
        for at_once in (3, 16):
            assert answer_all(engine, requests, at_once=at_once).answers == alone
        assert not engine.speculator.is_off
    assert alone != answer_all(_build(folder, {"method": "none"}), requests).answers


def test_a_draft_model_with_another_vocabulary_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"speculation\.model.*nowhere"):
        _build(folder, {"method": "draft_model", "model": "nowhere"})
    config = LlamaConfig.from_pretrained(folder / "TARGET")
    config.vocab_size = 300
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"another vocabulary"):
        _build(folder, {"method": "draft_model", "model": str(tmp_path / "wide")})


def _plan(speculation: dict[str, object], target: Path) -> MemoryPlan:
    config = EngineConfig.model_validate(
        {"model": {"path": str(target), "load_format": "dummy"}, "speculation": speculation}
    )
    return plan_memory(read_model_facts(config.model), config, read_machine())


def test_the_plan_counts_the_draft_model_and_its_cache(folder: Path) -> None:
    alone = _plan({}, folder / "TARGET")
    both = _plan({"method": "draft_model", "model": str(folder / "OTHER")}, folder / "TARGET")
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token * 3 // 2  # one layer more than two
    assert both.speculation_bytes > alone.speculation_bytes == 0
    assert "OTHER" in render_plan(both)


def test_a_draft_model_is_planned_with_typical_acceptance_too(folder: Path) -> None:
    config = {
        "model": {"path": str(folder / "TARGET"), "load_format": "dummy"},
        "speculation": {"method": "draft_model", "model": str(folder / "OTHER")},
        "lossy_speculation": {"acceptance": "typical"},
    }
    checked = EngineConfig.model_validate(config)
    assert plan_memory(read_model_facts(checked.model), checked, read_machine()).draft is not None
    strict = EngineConfig.model_validate(config | {"device": {"determinism": "strict"}})
    with pytest.raises(ValueError, match="determinism is strict, which promises"):
        plan_memory(read_model_facts(strict.model), strict, read_machine())


def test_the_plan_counts_the_weights_and_the_rows_of_an_eagle_head(folder: Path) -> None:
    alone = _plan({}, folder / "TARGET")
    both = _plan({"method": "eagle3", "model": str(folder / "EAGLE")}, folder / "TARGET")
    row = 2 * 2 * 8 * 4  # keys and values of two heads
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token + 2 * row + HIDDEN_SIZE // both.block_size * 4
    assert both.draft_kv_bytes_per_token == both.kv_bytes_per_token - alone.kv_bytes_per_token
    num_bytes = (folder / "EAGLE" / "model.safetensors").stat().st_size  # in float32, and a header
    assert num_bytes // 2 - 4096 < both.speculation_bytes < num_bytes // 2
    assert "speculation" in render_plan(both)


def test_an_eagle_head_of_another_model_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    for field, value in (("vocab_size", 300), ("hidden_size", 48)):
        config = json.loads((folder / "TARGET" / "config.json").read_text()) | {field: value}
        target = tmp_path / field
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"this one has {value}: it belongs to another model"):
            _plan({"method": "eagle3", "model": str(folder / "EAGLE")}, target)


@pytest.fixture(scope="module")
def grouped(folder: Path) -> Path:
    """A model whose layers have block tables of two groups: windows, and the whole text."""
    Gemma2Config(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        sliding_window=20,
        max_position_embeddings=256,
        architectures=["Gemma2ForCausalLM"],
    ).save_pretrained(folder / "GROUPED")
    return folder


def test_a_draft_model_whose_layers_have_several_groups_keeps_each_in_a_place_of_its_own(grouped: Path) -> None:
    """Its target is the same model: each draft is right, but where rounding tips a near tie."""
    speculation: dict[str, object] = {"method": "draft_model", "model": "GROUPED", "depth": 3}
    engine = _build(grouped, speculation, target="GROUPED", kernels="torch")
    assert engine.builder.tables.num_groups == 2
    for request in _requests(0.8)[:6]:
        engine.add(request)
    num_drafts = num_accepted = 0
    while engine.has_work:
        stats = engine.step()[2]
        num_drafts += stats.num_draft_tokens
        num_accepted += sum(stats.accepted_by_position)
    assert num_accepted > 0.9 * num_drafts > 20


def test_an_eagle_head_works_in_the_blocks_that_keep_the_whole_text(grouped: Path) -> None:
    found = []
    for speculation in ({"method": "none"}, METHODS["eagle3"]):
        engine = _build(grouped, speculation, target="GROUPED", kernels="torch", determinism="strict")
        assert engine.builder.tables.num_groups == 2
        for _ in range(2):
            found.append(answer_all(engine, _requests(0.8)[:4]).answers)
        assert not engine.speculator.is_off
    assert found[0] == found[1] == found[2] == found[3]


def test_the_plan_counts_a_draft_model_in_the_blocks_of_each_group(grouped: Path) -> None:
    alone = _plan({"method": "none"}, grouped / "GROUPED")
    both = _plan({"method": "draft_model", "model": str(grouped / "OTHER")}, grouped / "GROUPED")
    assert both.draft is not None
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token + 2 * both.draft.kv_bytes_per_token


def test_a_compiled_draft_model_leaves_torch_the_threads_of_its_target(grouped: Path) -> None:
    """Sums of torch's products depend on them, and the fingerprint names them."""
    before = torch.get_num_threads()
    try:
        _build(grouped, {"method": "draft_model", "model": "OTHER", "depth": 2}, target="GROUPED", kernels="auto")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_heads_draft_chains_where_each_token_goes_through_the_model_alone(folder: Path) -> None:
    """As `device.determinism: strict` has it where nothing else helps: a tree failed the requests that it was for."""
    found = []
    for speculation in ({"method": "none"}, METHODS["medusa"]):
        engine = _build(folder, speculation, kernels="torch", determinism="strict")
        assert isinstance(engine.executor, ModelExecutor)
        assert isinstance(engine.executor.runner, OneTokenRunner)
        found.append(answer_all(engine, _requests(0.8)[:5]).answers)
    assert found[0] == found[1]
