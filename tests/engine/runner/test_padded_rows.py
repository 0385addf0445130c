"""A seed's promise on torch layers in bfloat16: a row's bits are the same however the row is computed."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.attention.torch_backend import TorchAttention
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import KVCache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.quantization.linear import exchange_linears
from engine.quantization.method import FORMATS, has_fast_bf16, make_methods
from engine.runner.model_runner import ModelRunner
from engine.runner.padded_rows import make_rows_independent
from engine.types import Request, SamplingParams, Scheduled, Sequence, TokenLogprobs
from kernels.numba.program.team import Team
from tests.support.stepping import forward

VOCAB_SIZE, BLOCK_SIZE, NUM_BLOCKS = 99, 16, 60
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 1104,  # deep enough for oneDNN to cut the sum of a single row
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 1104, "num_experts_per_tok": 2}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=5, shared_expert_intermediate_size=80),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=5, head_dim=32),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=24, query_pre_attn_scalar=32),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "olmo2": Olmo2Config(**SIZES),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    config: PreTrainedConfig = MODELS[request.param]
    torch.manual_seed(0)
    model = build_model(copy.deepcopy(config), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape) * (0.15 if parameter.ndim > 1 else 0.3)
        parameter.data = (noise + 1 if "norm" in name else noise).to(parameter.dtype)
    exchange_linears(model, make_methods(FORMATS, "none"))
    return model


def make_runner(model: Model, *, is_compiled: bool = True, num_threads: int = 1) -> ModelRunner:
    layers = model.attention_layers
    cache = KVCache(
        layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        codec=DenseCodec(torch.bfloat16, keys_as_columns=is_compiled),
    )
    if not is_compiled:
        return ModelRunner(model, cache, TorchAttention(cache))
    attention = NumbaAttention(cache, Team(num_threads, scratch_bytes=scratch_bytes(layers, cache.block_size)))
    return ModelRunner(model, cache, attention)


@torch.inference_mode()
def logits_of(runner: ModelRunner, *, seed: int) -> dict[tuple[int, int], list[Tensor]]:
    """By sequence and position: each row's logits, in random chunks of random batches. Seed 0: a sequence at a time."""
    rng = random.Random(seed)
    texts = random.Random(1)
    free = rng.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    num_groups = len(windows_of(runner.model.attention_layers))
    seqs = []
    for name, length in (("a", 150), ("b", 9), ("c", 33), ("d", 1)):
        ids = [texts.randrange(2, VOCAB_SIZE) for _ in range(length)]
        request = Request(request_id=name, prompt_token_ids=ids, params=SamplingParams(seed=0, max_tokens=1))
        tables = [[free.pop() for _ in range(0, length + 1, BLOCK_SIZE)] for _ in range(num_groups)]
        seqs.append(Sequence(request, ids, block_tables=tables, num_released_blocks=[0] * num_groups))
    found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    while left := [seq for seq in seqs if seq.num_computed_tokens < seq.num_tokens]:
        chosen = rng.sample(left, rng.randint(1, len(left))) if seed else left[:1]
        items = []
        for seq in chosen:
            size = min(seq.num_tokens - seq.num_computed_tokens, rng.choice([1, 1, 2, 5, 40]) if seed else 1000)
            items.append(Scheduled(seq, size, 0, samples=False, num_scored=size))
        _, logits = forward(runner, items)
        for item, rows in zip(items, logits.clone().split([item.num_new_tokens for item in items]), strict=True):
            for offset, row in enumerate(rows):
                found[seqs.index(item.seq), item.seq.num_computed_tokens + offset].append(row)
            item.seq.num_computed_tokens += item.num_new_tokens
    return found


def differences(runner: ModelRunner, others: list[ModelRunner]) -> int:
    """Rows that have other bits in some batch."""
    alone = logits_of(runner, seed=0)
    num = 0
    for seed, other in enumerate(others, start=1):
        found = logits_of(other, seed=seed)
        assert found.keys() == alone.keys()
        num += sum(not torch.equal(row, alone[place][0]) for place, rows in found.items() for row in rows)
    return num


def test_a_row_has_the_same_bits_however_it_is_computed(model: Model) -> None:
    if not make_rows_independent(model, is_strict=False):
        has_tiles = torch.cpu._is_amx_tile_supported()
        assert has_tiles or not has_fast_bf16(), "it holds wherever oneDNN multiplies bfloat16 by AVX512-BF16"
        pytest.skip("on this processor a row's bits depend on the number of rows, and docs/guarantees.md says so")
    runners = [make_runner(model), make_runner(model, num_threads=3), make_runner(model)]
    assert differences(make_runner(model), runners) == 0


def test_rows_are_left_alone_where_products_are_not_known(model: Model) -> None:
    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 4, 4), requires_grad=False)

    model.fused = Fused()
    modules = [type(module) for module in model.modules()]
    assert not make_rows_independent(model, is_strict=True)
    assert [type(module) for module in model.modules()] == modules


Answers = dict[str, tuple[list[int], list[TokenLogprobs]]]


def answers_of(engine: Engine, requests: list[Request], *, at_once: int) -> Answers:
    waiting, answers = list(requests), {request.request_id: ([], []) for request in requests}
    running: set[str] = set()
    while waiting or engine.has_work:
        while waiting and len(running) < at_once:
            running.add(waiting[0].request_id)
            engine.add(waiting.pop(0))
        for output in engine.step()[0]:
            tokens, logprobs = answers[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            if output.finish_reason:
                running.discard(output.request_id)
    return answers


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize(("dtype", "determinism"), [("bfloat16", "fast"), ("float32", "strict")])
def test_a_seed_means_the_same_tokens_with_experts(tmp_path: Path, dtype: str, determinism: str, kernels: str) -> None:
    MODELS["qwen3-moe"].save_pretrained(tmp_path)
    settings = {
        "model": {"path": str(tmp_path), "load_format": "dummy", "dtype": dtype},
        "device": {"num_threads": 1, "determinism": determinism, "kernels": kernels},
        "kv_cache": {"memory": "4000tokens"},
    }
    engine, info = build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)
    if kernels == "torch" and "row alone" not in info.settings["device.determinism"].reason and determinism == "fast":
        pytest.skip("on this processor a row's bits depend on the number of rows, and effective-config says so")
    rng = random.Random(3)
    shared = [rng.randrange(2, VOCAB_SIZE) for _ in range(40)]
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=(shared if i % 2 else []) + [rng.randrange(2, VOCAB_SIZE) for _ in range(1 + 7 * i)],
            params=SamplingParams(seed=i, max_tokens=8, temperature=1.0, logprobs=2),
        )
        for i in range(9)
    ]
    alone = answers_of(engine, requests, at_once=1)  # later ones find prefixes of earlier ones
    assert answers_of(engine, requests, at_once=9) == alone
    assert answers_of(engine, requests[::-1], at_once=4) == alone
