"""Whole engines on tiny models, with each way to speculate: for tests that drafts change nothing but the speed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.runner.draft_executor import DraftExecutor
from engine.runner.executor import ModelExecutor
from engine.runner.model_runner import ModelRunner
from engine.runner.step_builder import StepBuilder
from engine.sampling.host_sampler import HostSampler
from engine.sampling.typical import TypicalRule
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.controller import DraftController
from engine.speculation.draft_model import DraftModelProposer
from engine.speculation.medusa import MedusaProposer
from engine.speculation.medusa_checkpoint import MedusaCheckpoint
from engine.speculation.medusa_heads import MedusaHeads
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.speculation.proposer import Proposer
from engine.speculation.speculator import Speculator
from engine.speculation.step_costs import StepCosts
from engine.speculation.suffix import SuffixProposer
from engine.speculation.token_map import TokenMap
from engine.structured.grammar_states import GrammarStates
from tests.support.eagle_files import make_eagle, random_eagle
from tests.support.grammars import make_grammars

VOCAB_SIZE, HIDDEN_SIZE, BLOCK_SIZE, MAX_MODEL_LEN = 24, 32, 4, 90
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)
METHODS = ("none", "ngram", "suffix", "draft_model", "medusa_chain", "medusa", "eagle3", "p_eagle")
FREE_ROWS = {1: 1.0, 512: 1.0001}  # seconds of steps: drafts are worth verifying, whatever their chances


def make_model(*, noise: float = 0.0, num_layers: int = 2, window: int | None = None) -> Model:
    """Weights of one seed. noise: of its own in each weight, as a part of its size"""
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": num_layers, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
    config = LlamaConfig(**sizes) if window is None else MistralConfig(**sizes, sliding_window=window)
    model = build_model(config, dtype=torch.float32)
    generator, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(values * (1 + noise * torch.randn(parameter.shape, generator=own)))
    return model


def make_runner(model: Model, num_blocks: int) -> ModelRunner:
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
    )
    return ModelRunner(model, cache, TorchAttention(cache))


def make_draft_model(num_blocks: int, *, noise: float = 0.15, vocab_size: int = VOCAB_SIZE) -> DraftExecutor:
    """The target with noise in its weights, so that it is often right and often wrong."""
    runner = make_runner(make_model(noise=noise), num_blocks)
    return DraftExecutor(
        ModelExecutor(runner, HostSampler(VOCAB_SIZE)),
        StepBuilder(BLOCK_SIZE, VOCAB_SIZE),
        TokenMap(vocab_size, {}, {}),
        max_model_len=MAX_MODEL_LEN,
        max_num_tokens=24,
    )


def make_heads(model: nn.Module | None, *, num_heads: int = 3, hidden_size: int = HIDDEN_SIZE) -> MedusaHeads:
    """Random blocks under the target's own output layer."""
    generator = torch.Generator().manual_seed(2)
    blocks = [
        [(torch.randn(hidden_size, hidden_size, generator=generator) * 0.2, torch.zeros(hidden_size))]
        for _ in range(num_heads)
    ]

    def output_rows(token_ids: Tensor | None) -> Tensor:
        if isinstance(model, Model):
            return model.output_rows(token_ids)
        rows = torch.randn(VOCAB_SIZE, hidden_size, generator=torch.Generator().manual_seed(3))
        return rows if token_ids is None else rows[token_ids]

    checkpoint = MedusaCheckpoint(
        hidden_size=hidden_size, blocks=blocks, outputs=[], token_map=None, markov=None, newest=[], accuracies=(),
        logit_scale=1.0,
    )  # fmt: skip
    return MedusaHeads(checkpoint, output_rows, vocab_size=VOCAB_SIZE)


def make_proposer(method: str, model: Model, *, num_blocks: int, num_drafts: int = 5) -> Proposer:
    if method == "none":
        return NoProposer()
    if method == "ngram":
        return NgramProposer(num_drafts=num_drafts, ngram_min=1, ngram_max=3)
    if method == "suffix":
        return SuffixProposer(num_drafts=num_drafts)
    if method == "draft_model":
        return DraftModelProposer(make_draft_model(num_blocks), num_drafts=num_drafts)
    if method == "eagle3":
        return make_eagle(random_eagle(aux=(1, 0), known=tuple(range(20))), model, num_blocks=num_blocks, num_drafts=6)
    if method == "p_eagle":
        eagle = random_eagle(seed=10, aux=(0, 1), num_layers=2, mask_token=3, known=None)
        return make_eagle(eagle, model, num_blocks=num_blocks, num_drafts=num_drafts)
    heads = make_heads(model)
    if method == "medusa":
        return MedusaProposer(heads, num_drafts=9, vocab_size=VOCAB_SIZE)
    return MedusaProposer(heads, num_drafts=3, vocab_size=VOCAB_SIZE, max_children=1)


def make_engine(
    method: str,
    *,
    num_blocks: int = 300,
    budget: int = 64,
    window: int | None = None,
    is_auto: bool = False,
    typical: TypicalRule | None = None,
    grammars: GrammarStates | None = None,
) -> Engine:
    """is_auto: a controller chooses what is verified; typical: drafts are kept that are likely enough"""
    model = make_model(window=window)
    limits = SchedulerLimits(
        max_num_seqs=16, max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN, headroom=1, num_lookahead_tokens=5
    )
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, windows=[window])
    proposer = make_proposer(method, model, num_blocks=num_blocks)
    executor = ModelExecutor(make_runner(model, num_blocks), HostSampler(VOCAB_SIZE))
    controller = None
    if is_auto:
        costs = StepCosts(FREE_ROWS)
        controller = DraftController(costs, max_rows=budget, depth_costs_time=proposer.needs.depth_costs_time)
    speculator = Speculator(
        proposer, VOCAB_SIZE, controller, typical=typical, grammars=make_grammars() if grammars is None else grammars
    )
    return Engine(executor, Scheduler(kv, limits), speculator, COST)
