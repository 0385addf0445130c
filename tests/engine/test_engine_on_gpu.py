"""The whole engine as it runs on a GPU, on a simulated one: every word as on the CPU, and no wait that is not meant.

Graphs, steps that are launched ahead, pinned copies, the measured workspace and Triton's kernels are all in it, put
together as `build_engine` does it.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3MoeConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.quantization.linear import KeptMatrix
from engine.runner import cuda_graphs as graph_runner
from engine.types import Request, SamplingParams, TokenLogprobs
from tests.support.eagle_files import random_eagle, vllm, write
from tests.support.simulated_gpu import simulated_gpu

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not chosen before its import"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # to infinity, as it should
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # rows that pad a step hold anything
]
VOCAB_SIZE = 40
SIZES = {
    "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES),
    "Mistral": MistralConfig(**SIZES, sliding_window=10),
    "Qwen3Moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
PLAIN: list[dict[str, Any]] = [{"temperature": 0.8}, {"logprobs": 2}, {}]  # the next step needs their tokens alone
EDITED: list[dict[str, Any]] = [
    {"presence_penalty": 0.5, "repetition_penalty": 1.2, "temperature": 1.0, "top_p": 0.8, "top_k": 9},
    {"logit_bias": {3: 4.0}, "min_tokens": 5, "stop_token_ids": [7]},
    {"allowed_token_ids": [1, 2, 3, 4], "prompt_logprobs": 3, "logprobs": 0},
    {"bad_words": [[3, 4], [5]], "min_p": 0.1, "temperature": 1.1},
]
Answers = dict[str, tuple[list[int], list[TokenLogprobs]]]  # tokens, and the log-probabilities of prompt and output


@pytest.fixture(autouse=True)
def graphs_are_captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"num_uses": 0, "num_steps_between": 0, "max_num_graphs": 3}
    monkeypatch.setattr(graph_runner.GraphLimits.__init__, "__kwdefaults__", defaults)


def _sections(folder: Path, model: str = "Llama", **others: object) -> dict[str, object]:
    config = MODELS[model]
    config.architectures = [f"{model}ForCausalLM"]
    config.save_pretrained(folder)
    return {
        "model": {"path": str(folder), "load_format": "dummy", "dtype": "float32"},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 24},
        "kv_cache": {"memory": "640tokens"},
        **others,
    }


def _engine(sections: dict[str, object]) -> Engine:
    return build_engine(EngineConfig.model_validate(sections), lambda phase, detail: None)[0]


def _request(number: int, length: int, max_tokens: int, **params: Any) -> Request:
    prompt = [(7 * i + number) % VOCAB_SIZE for i in range(length)]
    settings = {"temperature": 0.0, **params}
    return Request(
        request_id=str(number),
        prompt_token_ids=prompt,
        params=SamplingParams(seed=number, max_tokens=max_tokens, **settings),
    )


def _answers(engine: Engine, requests: list[Request]) -> Answers:
    tokens, logprobs = defaultdict(list), defaultdict(list)
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += [*(output.prompt_logprobs or []), *(output.logprobs or [])]
    return {name: (tokens[name], logprobs[name]) for name in tokens}


def _matrices(engine: Engine) -> list[KeptMatrix]:
    return [module for module in engine.executor.runner.model.modules() if isinstance(module, KeptMatrix)]


def _requests(kinds: list[dict[str, Any]]) -> list[Request]:
    return [_request(number, (3, 20, 9)[number % 3], 5 + 2 * number, **kind) for number, kind in enumerate(kinds)]


def _check_same(found: Answers, expected: Answers) -> None:
    assert {name: tokens for name, (tokens, _) in found.items()} == {
        name: tokens for name, (tokens, _) in expected.items()
    }
    for name, (_, logprobs) in expected.items():
        numbers = [one.logprob for one in logprobs]
        assert [one.logprob for one in found[name][1]] == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "method", "determinism", "kinds"),
    [
        ("Llama", "none", "fast", PLAIN),
        ("Llama", "none", "fast", EDITED),
        ("Mistral", "ngram", "fast", PLAIN),
        ("Mistral", "none", "strict", PLAIN),
        ("Qwen3Moe", "none", "fast", PLAIN),
    ],
)
def test_a_gpu_says_what_a_cpu_says(
    tmp_path: Path, model: str, method: str, determinism: str, kinds: list[dict[str, Any]]
) -> None:
    sections = _sections(tmp_path, model)
    on_cpu = _engine({**sections, "device": {"name": "cpu", "kernels": "torch"}})
    speculation = {"method": method, "depth": 2} if method != "none" else {"method": method}
    with simulated_gpu() as gpu:
        engine = _engine({**sections, "speculation": speculation, "device": {"determinism": determinism}})
        _check_same(_answers(engine, _requests(kinds)), _answers(on_cpu, _requests(kinds)))
    assert gpu.num_graphs > 1
    assert gpu.num_replays > 2 * gpu.num_graphs


@pytest.mark.parametrize(
    ("model", "quantization", "determinism"),
    [("Llama", "int4", "fast"), ("Llama", "int8", "strict"), ("Qwen3Moe", "int4", "fast")],
)
def test_quantised_layers_say_on_a_gpu_what_their_definition_says(
    tmp_path: Path, model: str, quantization: str, determinism: str
) -> None:
    """The definition: the floats that codes stand for, on a CPU."""
    sections = _sections(tmp_path, model)
    sections["model"]["quantization"] = quantization
    with simulated_gpu() as gpu:
        engine = _engine({**sections, "device": {"determinism": determinism}})
        matrices = _matrices(engine)
        assert {matrix.describe().split(",")[0] for matrix in matrices[:-1]} == {quantization}
        assert matrices[-1].describe().startswith("int8")
        found = _answers(engine, _requests(PLAIN))
        dense = [matrix.dense().cpu() for matrix in matrices]
    sections["model"]["quantization"] = "none"
    on_cpu = _engine({**sections, "device": {"name": "cpu", "kernels": "torch"}})
    for matrix, weight in zip(_matrices(on_cpu), dense, strict=True):
        matrix.keep(nn.Parameter(weight, requires_grad=False))
    _check_same(found, _answers(on_cpu, _requests(PLAIN)))
    assert gpu.num_replays > gpu.num_graphs > 1


@pytest.mark.parametrize(("num_layers", "mask_token", "has_embedding"), [(1, None, False), (2, 3, True)])
def test_an_eagle_head_drafts_on_a_gpu_and_changes_nothing(
    tmp_path: Path, num_layers: int, mask_token: int | None, has_embedding: bool
) -> None:
    eagle = random_eagle(
        hidden=48,
        target_hidden=48,
        vocab=VOCAB_SIZE,
        aux=(0,),
        fused_norm="each",
        num_layers=num_layers,
        mask_token=mask_token,
        has_embedding=has_embedding,
    )
    head = write(tmp_path / "head", *vllm(eagle))
    sections = _sections(tmp_path / "model")
    on_cpu = _engine({**sections, "device": {"name": "cpu", "kernels": "torch"}})
    speculation = {"method": "eagle3", "model": str(head), "depth": 2}
    with simulated_gpu() as gpu:
        engine = _engine({**sections, "speculation": speculation})
        for request in _requests(PLAIN):
            engine.add(request)
        num_drafts = 0
        while engine.has_work:
            num_drafts += engine.step()[2].num_draft_tokens
        assert num_drafts > 10
        _check_same(_answers(engine, _requests(PLAIN)), _answers(on_cpu, _requests(PLAIN)))
        assert not engine.speculator.is_off
    assert gpu.num_replays > 0


def test_a_decoding_step_waits_for_its_tokens_alone(tmp_path: Path) -> None:
    """Neither a replayed step nor one with penalties, bans and log-probabilities asks the device anything else."""
    kinds = [{"presence_penalty": 0.5}, {"logprobs": 2, "temperature": 0.7}, {"bad_words": [[3, 4]]}]
    with simulated_gpu() as gpu:
        engine = _engine(_sections(tmp_path))
        for number, kind in enumerate(kinds):
            engine.add(_request(number, 5, 40, **kind))
        for _ in range(4):
            engine.step()
        num_waits, num_replays = gpu.num_waits, gpu.num_replays
        for _ in range(8):
            engine.step()
        assert gpu.num_waits == num_waits
        assert gpu.num_replays == num_replays + 8


def test_prompts_that_come_and_go_make_no_step_wait_either(tmp_path: Path) -> None:
    with simulated_gpu() as gpu:
        engine = _engine(_sections(tmp_path))
        _answers(engine, [_request(number, 5, 5 - number) for number in range(3)])  # graphs of one, two and four rows
        num_waits, num_replays = gpu.num_waits, gpu.num_replays
        _answers(engine, [_request(number, 16 + 9 * number, 3 + number, logprobs=1) for number in range(3)])
        assert gpu.num_waits == num_waits
        assert gpu.num_replays > num_replays


def test_a_gpu_s_memory_is_planned_and_not_exceeded(tmp_path: Path) -> None:
    sections = _sections(tmp_path, kv_cache={"memory": "0.5"})
    with simulated_gpu(total_bytes=1 << 30) as gpu:
        engine = _engine(sections)
        _answers(engine, _requests(PLAIN))
        assert 1 << 26 < gpu.used_bytes < gpu.peak_bytes < 1 << 29


def test_a_step_that_finds_no_memory_is_run_in_smaller_ones(tmp_path: Path) -> None:
    sections = _sections(tmp_path, scheduler={"max_num_seqs": 4, "max_num_batched_tokens": 40})
    requests = [_request(number, 40, 1, prompt_logprobs=0) for number in range(2)]
    with simulated_gpu() as gpu:
        engine = _engine(sections)
        torch.cuda.reset_peak_memory_stats()
        num_before = gpu.used_bytes
        expected = _answers(engine, requests)
        num_needed = gpu.peak_bytes - num_before
    with simulated_gpu() as gpu:
        engine = _engine(sections)
        gpu.total_bytes = gpu.used_bytes + num_needed * 3 // 4
        _check_same(_answers(engine, requests), expected)
        assert engine.scheduler.limits.max_num_batched_tokens < 40
