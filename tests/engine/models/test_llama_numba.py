"""Compiled layers against torch's, in every weight format, and their rows' independence of how they are computed."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import defaultdict
from itertools import count
from types import FrameType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.attention.torch_backend import TorchAttention
from engine.config import Activations
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import KVCache
from engine.models.llama import Llama
from engine.models.llama_numba import NumbaLlama
from engine.models.registry import build_model
from engine.models.rope import RotaryEmbedding, RotationTable, default_rope
from engine.quantization.linear import PLAIN, KeptMatrix, Linear, exchange_linears
from engine.quantization.method import COMPILED_FORMATS, make_methods
from engine.runner.model_runner import ModelRunner
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence
from kernels.layout import MAX_ROTATIONS
from kernels.numba.program.program import Step
from kernels.numba.program.team import Team
from tests.support.stepping import forward, inputs_for

BLOCK_SIZE = 16
VOCAB_SIZE = 99
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
HALF_TURNED = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def sizes(**changes: object) -> dict[str, object]:
    return {**SIZES, **changes}


MODELS = {
    "llama": LlamaConfig(**sizes()),
    "llama with biases and tied embeddings": LlamaConfig(
        **sizes(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32)
    ),
    "llama with odd groups": LlamaConfig(**sizes(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)),
    "llama 3 rope": LlamaConfig(**sizes(rope_parameters=LLAMA3)),
    "mistral with a window smaller than the prompt": MistralConfig(**sizes(sliding_window=9)),
    "qwen2": Qwen2Config(**sizes()),
    "qwen2 with some windowed layers": Qwen2Config(
        **sizes(use_sliding_window=True, sliding_window=20, max_window_layers=1)
    ),
    "qwen3": Qwen3Config(**sizes(head_dim=32, tie_word_embeddings=True)),
    "smollm3": SmolLM3Config(**sizes(no_rope_layer_interval=2)),
    "phi3, half turned": Phi3Config(**sizes(rope_parameters=HALF_TURNED, tie_word_embeddings=False)),
    "qwen2-moe, a shared expert and a layer without": Qwen2MoeConfig(
        **sizes(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=48),
        mlp_only_layers=[1],
    ),
    "olmoe": OlmoeConfig(**sizes(num_experts=5, num_experts_per_tok=2, intermediate_size=32)),
}
SHARES = {"num_experts": 20, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
SPARSE = {
    "mixtral": MixtralConfig(**sizes(num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "qwen3-moe": Qwen3MoeConfig(**sizes(head_dim=16, **SHARES)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """With weights of a size that lets every part of it show in the logits."""
    torch.manual_seed(0)
    model = build_model(copy.deepcopy(config), dtype=dtype)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape) * (0.15 if parameter.ndim > 1 else 0.3)
        parameter.data.copy_(noise + 1 if "norm" in name else noise)
    assert isinstance(model, Llama)
    assert model.why_not_compiled == ""
    return model


def compiled(model: Llama, format_name: str, activations: Activations = "int16") -> Llama:
    """A copy with packed matrices."""
    packed = copy.deepcopy(model)
    exchange_linears(packed, make_methods(COMPILED_FORMATS, format_name, activations=activations))
    return packed


def widened(model: Llama) -> Llama:
    model = copy.deepcopy(model).float()
    for module in model.modules():
        if isinstance(module, KeptMatrix):
            module.dtype = torch.float32
    return model


def unpacked(packed: Llama) -> Llama:
    """A copy for torch, with the very matrices that the compiled products multiply by."""
    model = widened(packed)
    places = [(parent, name) for parent in model.modules() for name, _ in parent.named_children()]
    for parent, name in places:
        child = getattr(parent, name)
        if isinstance(child, Linear):
            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            linear.weight.data, linear.bias = child.dense(), child.bias
            setattr(parent, name, linear)
        elif isinstance(child, KeptMatrix):
            child.keep(nn.Parameter(child.dense()))
            child.method = PLAIN
    return model.requires_grad_(False)


class RoundingLinear(nn.Linear):
    """Rounds its rows to bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16().float())


def rounding(model: Llama) -> Llama:
    """A copy of an unpacked model whose matrix products round their rows."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundingLinear
    return model


def compiled_runner(
    packed: Llama,
    *,
    num_blocks: int = 160,
    num_threads: int = 1,
    dtype: torch.dtype = torch.float32,
    activations: torch.dtype = torch.float32,
) -> ModelRunner:
    """dtype: of the cache; activations: of rows that meet matrices of bfloat16"""
    layers = packed.attention_layers
    cache = KVCache(layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(dtype, keys_as_columns=True))
    team = Team(num_threads, scratch_bytes=scratch_bytes(layers, cache.block_size))
    attention = NumbaAttention(cache, team)
    return ModelRunner(NumbaLlama(packed, attention, team, dtype=activations), cache, attention)


def torch_runner(model: Llama, *, dtype: torch.dtype = torch.float32) -> ModelRunner:
    cache = KVCache(model.attention_layers, num_blocks=160, block_size=BLOCK_SIZE, codec=DenseCodec(dtype))
    return ModelRunner(model, cache, TorchAttention(cache))


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in (150, 9, 33)]


class Texts:
    """Sequences whose tokens are known, of which a runner computes every row's logits in one way or another."""

    def __init__(self, runner: ModelRunner, *, seed: int = 0) -> None:
        self.runner, self.rng = runner, random.Random(seed)
        self.free = self.rng.sample(range(1, 160), 159)
        self.seqs = [self.sequence(str(i), ids) for i, ids in enumerate(prompts())]
        self.logits: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # by sequence and position

    def sequence(self, name: str, ids: list[int]) -> Sequence:
        request = Request(request_id=name, prompt_token_ids=ids, params=SamplingParams(seed=0, max_tokens=1))
        num_groups = len(windows_of(self.runner.model.attention_layers))
        starts = range(0, len(ids) + 8, BLOCK_SIZE)  # room for drafts that are wrong
        tables = [[self.free.pop() for _ in starts] for _ in range(num_groups)]
        return Sequence(request, ids, block_tables=tables, num_released_blocks=[0] * num_groups)

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> list[Tensor]:
        _, logits = forward(self.runner, batch)
        return list(logits.clone().split([item.num_logits for item in batch]))

    def whole(self) -> list[Tensor]:
        """All in one step."""
        return self.run(
            [Scheduled(seq, seq.num_tokens, 0, samples=False, num_scored=seq.num_tokens) for seq in self.seqs]
        )

    def in_pieces(self) -> None:
        """Random chunks, single tokens and chains of right drafts, in mixed batches; each starts over once."""
        rng = self.rng
        while unfinished := [seq for seq in self.seqs if seq.num_computed_tokens < seq.num_tokens]:
            batch = [self.piece(seq) for seq in rng.sample(unfinished, rng.randint(1, len(unfinished)))]
            for item, rows in zip(batch, self.run(batch), strict=True):
                first = item.seq.num_computed_tokens
                for position, row in enumerate(rows, start=first):
                    self.logits[self.seqs.index(item.seq), position].append(row)
                item.seq.num_computed_tokens += item.num_new_tokens
            for seq in self.seqs:
                if not seq.num_preemptions and seq.num_computed_tokens > seq.num_tokens // 2:
                    self.preempt(seq)

    def piece(self, seq: Sequence) -> Scheduled:
        first = seq.num_computed_tokens
        num_new = min(seq.num_tokens - first, self.rng.choice([1, 1, 3, 7, 60]))
        num_drafts = self.rng.choice([0, num_new - 1]) if num_new < 8 else 0
        seq.draft_token_ids = seq.token_ids[first + num_new - num_drafts : first + num_new]
        seq.draft_parents = list(range(-1, num_drafts - 1))
        return Scheduled(seq, num_new, num_drafts, samples=True, num_scored=num_new - num_drafts - 1)

    def preempt(self, seq: Sequence) -> None:
        """Its blocks go to others, which is to say that it gets them in another order."""
        seq.num_computed_tokens, seq.num_preemptions = 0, 1
        seq.block_tables = [self.rng.sample(table, len(table)) for table in seq.block_tables]


def tolerance_of(model: Llama, format_name: str) -> float:
    """Distance that two correct evaluations may have, relative to the largest logit.

    A float32 sum of n terms in another order differs by a random walk of n roundings, sqrt(n) 2^-24 (Higham and Mary
    2019, "A New Approach to Probabilistic Rounding Error Analysis"). What one product adds, the next ones carry on, so
    the walks of all products that follow one another add up. The integer formats also round every group of 32
    activations to 2^-16 of its largest in each matrix product, which is three times as much of their root mean square.
    """
    a, context = model.architecture, max(map(len, prompts()))
    layer = model.layers[0]
    mlp = getattr(layer.mlp, "experts", layer.mlp)
    matrices = [layer.self_attn.qkv_proj, layer.self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj]
    depths = [linear.in_features for linear in matrices]
    per_layer = sum(map(math.sqrt, (*depths, a.attention_layers[0].head_dim, context)))
    walk = (len(model.layers) * per_layer + math.sqrt(a.hidden_size)) * 2**-24
    num_products = len(model.layers) * len(matrices) + 1
    return walk + (3 * num_products * 2**-16 if format_name.startswith("int") else 0)


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        assert b.std() > 1e-3
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("format_name", COMPILED_FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_layers_compute_what_torch_computes_with_the_same_matrices(name: str, format_name: str) -> None:
    packed = compiled(make_model(MODELS[name]), format_name)
    ours = Texts(compiled_runner(packed)).whole()
    theirs = Texts(torch_runner(unpacked(packed))).whole()
    assert_close(ours, theirs, tolerance_of(packed, format_name))


@pytest.mark.parametrize("name", MODELS)
def test_exact_formats_lose_nothing_of_a_checkpoint(name: str) -> None:
    """Which the test above would not see: it compares with whatever the packed matrices hold."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(MODELS[name], dtype)
        theirs = Texts(torch_runner(widened(model))).whole()
        ours = Texts(compiled_runner(compiled(model, "none"))).whole()
        assert_close(ours, theirs, tolerance_of(model, "none"))


@pytest.mark.parametrize("format_name", ["fp16", "int4"])
@pytest.mark.parametrize("name", SPARSE)
def test_experts_compute_what_torch_computes_with_the_same_matrices(name: str, format_name: str) -> None:
    packed = compiled(make_model(SPARSE[name]), format_name)
    theirs = Texts(torch_runner(unpacked(packed))).whole()
    for num_threads in (1, 3):
        ours = Texts(compiled_runner(packed, num_threads=num_threads)).whole()
        assert_close(ours, theirs, tolerance_of(packed, format_name))


@pytest.mark.parametrize(("format_name", "error"), [("fp16", 2e-3), ("int8", 3e-2), ("int4", 0.6)])
def test_rounded_formats_stay_near_the_checkpoint(format_name: str, error: float) -> None:
    model = make_model(MODELS["llama"])
    theirs = torch.cat(Texts(torch_runner(model)).whole())
    ours = torch.cat(Texts(compiled_runner(compiled(model, format_name))).whole())
    assert 0 < (ours - theirs).square().mean() <= error**2 * theirs.square().mean()


@pytest.mark.parametrize("name", [name for name in MODELS if "moe" not in name])
def test_rows_are_rounded_to_bfloat16_where_they_meet_matrices_of_it_and_nowhere_else(name: str) -> None:
    packed = compiled(make_model(MODELS[name], torch.bfloat16), "none")
    ours = torch.cat(Texts(compiled_runner(packed, activations=torch.bfloat16)).whole())
    plain = unpacked(packed)
    rounded, exact = (torch.cat(Texts(torch_runner(model)).whole()) for model in (rounding(plain), plain))
    # what lies all but in the middle of two numbers of bfloat16 may become either one, and all that follows another
    bound = tolerance_of(packed, "none") * rounded.abs().max()
    assert (ours - rounded).abs().amax(1).sort().values[:20].max() <= bound
    assert (exact - rounded).abs().amax(1).min() > 10 * bound
    wide = compiled(make_model(MODELS[name]), "none")  # matrices of float32
    found = [Texts(compiled_runner(wide, activations=dtype)).whole() for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(*map(torch.cat, found))


@pytest.mark.parametrize("format_name", ["int8", "int4"])
def test_activations_of_8_bits_stay_near_those_of_16(format_name: str) -> None:
    model = make_model(MODELS["llama"])
    narrow, wide = (
        torch.cat(Texts(compiled_runner(compiled(model, format_name, activations=activations))).whole())
        for activations in ("int8", "int16")
    )
    assert 1e-3**2 < (narrow - wide).square().mean() / wide.square().mean() <= 5e-2**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_cache_rounds_keys_and_values_and_nothing_else(dtype: torch.dtype) -> None:
    packed = compiled(make_model(MODELS["llama"]), "none")
    ours = Texts(compiled_runner(packed, dtype=dtype)).whole()
    theirs = Texts(torch_runner(unpacked(packed), dtype=dtype)).whole()
    # a few keys and values lie so near the middle of two numbers that they are rounded to one here, to the other there
    assert_close(ours, theirs, 2 * torch.finfo(dtype).eps)
    exact = Texts(compiled_runner(packed)).whole()
    assert not torch.equal(ours[0], exact[0])


def test_the_inputs_of_layers_are_those_of_torch() -> None:
    packed = compiled(make_model(MODELS["llama"]), "none")
    plain = compiled_runner(packed)
    packed.show_inputs_of((1, 0))
    results = []
    for runner in (torch_runner(unpacked(packed)), compiled_runner(packed), plain):
        batch = [Scheduled(seq, seq.num_tokens, 0, False, num_scored=seq.num_tokens) for seq in Texts(runner).seqs]
        with torch.inference_mode():
            results.append([x.clone() for x in forward(runner, batch)])
    (expected, _), (found, logits), (hidden, plain_logits) = results
    size = packed.hidden_size
    assert found.shape == (expected.shape[0], 3 * size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, :size], hidden)
    assert torch.equal(logits, plain_logits)


@pytest.mark.parametrize("format_name", [*COMPILED_FORMATS, "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_has_the_same_bits_however_it_is_computed(name: str, format_name: str) -> None:
    if format_name == "bfloat16":
        activations = torch.bfloat16
        packed = compiled(make_model(MODELS[name], activations), "none")
    else:
        activations = torch.float32
        packed = compiled(make_model(MODELS[name]), format_name)
    whole = Texts(compiled_runner(packed, activations=activations)).whole()
    for seed, num_threads in ((1, 1), (2, 3)):
        runner = compiled_runner(packed, num_threads=num_threads, num_blocks=161, activations=activations)
        texts = Texts(runner, seed=seed)
        texts.in_pieces()
        assert len(texts.logits) == sum(len(ids) for ids in prompts())
        for (index, position), rows in texts.logits.items():
            assert all(torch.equal(row, whole[index][position]) for row in rows), (index, position)


@pytest.mark.parametrize("name", ["llama", "mistral with a window smaller than the prompt", "smollm3"])
def test_accepted_drafts_of_a_tree_become_part_of_the_context(name: str) -> None:
    packed = compiled(make_model(MODELS[name]), "none")
    whole = Texts(compiled_runner(packed)).whole()
    texts = Texts(compiled_runner(packed), seed=3)
    for index, seq in enumerate(texts.seqs):
        seq.num_computed_tokens = 0
        while (left := seq.num_tokens - seq.num_computed_tokens) > 0:
            first = seq.num_computed_tokens
            if left < 5:
                items, right = [Scheduled(seq, 1, 0, samples=True)], [0]
            else:  # two right drafts, each after a wrong one, and a right one that follows the second
                tokens = seq.token_ids[first + 1 : first + 4]
                wrong = [(token + 1) % VOCAB_SIZE for token in tokens]
                seq.draft_token_ids = [wrong[0], tokens[0], wrong[1], tokens[1], tokens[2]]
                seq.draft_parents = [-1, -1, 1, 1, 3]
                items, right = [Scheduled(seq, 6, 5, samples=True)], [0, 2, 4, 5]
            [rows] = texts.run(items)
            expected = whole[index][first : first + len(right)]
            assert (rows[right] - expected).abs().max() <= tolerance_of(packed, "none") * expected.abs().max()
            texts.runner.keep_accepted(
                inputs_for(texts.runner, items), [Sampled([], accepted=[row - 1 for row in right[1:]])]
            )
            seq.num_computed_tokens += len(right)


def test_logits_are_of_the_rows_that_are_asked_for() -> None:
    packed = compiled(make_model(MODELS["llama"]), "int8")
    runner = compiled_runner(packed)
    hidden = torch.randn(9, packed.hidden_size)
    logits = runner.model.compute_logits(hidden).clone()
    assert logits.shape == (9, VOCAB_SIZE)
    assert logits.is_contiguous()
    assert torch.equal(runner.model.compute_logits(hidden[::2]), logits[::2])
    assert runner.model.compute_logits(hidden[:0]).shape == (0, VOCAB_SIZE)


def test_a_model_of_more_rotations_than_a_step_has_room_for_is_not_compiled() -> None:
    """Their addresses would stand where those of the slots are."""
    assert Step.ROTATIONS + 2 * MAX_ROTATIONS <= Step.SLOTS
    kinds = ["full_attention", *(f"kind {number}" for number in range(MAX_ROTATIONS))]
    for number in (MAX_ROTATIONS, MAX_ROTATIONS + 1):
        config = Qwen2Config(**SIZES)
        config.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in kinds[:number]}
        model = build_model(config, dtype=torch.float32)
        assert isinstance(model, Llama)
        assert model.why_not_compiled == ("" if number == MAX_ROTATIONS else "5 rotations, more than 4")


@pytest.mark.parametrize("num_positions", [[1, 5, 1024, 1025, 3000], [2000, 2001, 2600]])
def test_a_rotation_is_the_same_whenever_it_was_computed(num_positions: list[int]) -> None:
    rope = RotaryEmbedding(default_rope(10_000.0, 16))
    table = RotationTable(rope)
    for number in num_positions:
        table.reach(number)
        assert len(table.cos) == len(table.sin) >= number
        for made, expected in zip(
            (table.cos, table.sin), rope(torch.arange(len(table.cos)), torch.float32), strict=True
        ):
            assert torch.equal(made, expected)
            assert made.is_contiguous()


class NoMemoryAt:
    """A profile function for which memory runs out once: in the so-manieth call of the modules under test."""

    def __init__(self, number: int) -> None:
        self.number, self.num_calls = number, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.endswith(("/llama_numba.py", "/products.py")):
            self.num_calls += 1
            if self.num_calls == self.number:
                sys.setprofile(None)
                raise MemoryError


def test_a_program_that_was_not_written_to_its_end_is_never_run() -> None:
    """It would write into memory that is another's by then."""
    packed = compiled(make_model(MODELS["qwen2"]), "int8")
    expected = Texts(compiled_runner(packed)).whole()
    for number in count(1):
        texts = Texts(compiled_runner(packed))
        texts.run([Scheduled(texts.seqs[1], 9, 0, samples=True)])  # a program of few rows is there already
        sys.setprofile(failure := NoMemoryAt(number))
        try:
            texts.whole()
        except MemoryError:
            pass
        finally:
            sys.setprofile(None)
        assert all(map(torch.equal, texts.whole(), expected)), f"call {number}"
        if failure.num_calls < number:
            break
    assert number > 100


class WithoutAddress(np.ndarray):
    """An array for which memory runs out when somebody asks where it is."""

    @property
    def ctypes(self) -> None:
        raise MemoryError


def test_tiles_are_written_where_the_step_says_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(compiled_runner(compiled(make_model(MODELS["llama"]), "none")))
    texts.run([Scheduled(texts.seqs[1], 9, 0, samples=True)])
    attention, empty = texts.runner.attention, np.empty
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *shape, **kind: empty(*shape, **kind).view(WithoutAddress))
        with pytest.raises(MemoryError):
            texts.whole()
    assert attention.step[Step.TILES] == attention._tiles.ctypes.data
