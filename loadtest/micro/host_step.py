"""What does the host do in a step of a GPU? `python -m loadtest.micro.host_step [--save]`

Microseconds of `Engine.step` with everything that a GPU's engine has but the GPU: the scheduler, graphs, the sampler,
steps that are launched ahead. Graphs and the sampling kernel are replaced by ones that do nothing, and copies to the
device are copies on the host; so what a real device adds is its own time per launch and copy, some 5 us each.
"decode": every sequence decodes one token, and the next step is launched before this one's tokens are known.
"3 drafts": every sequence verifies three drafts, all of which are wrong.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.model import Decoder
from engine.runner.cuda_graphs import GraphLimits, GraphRunner
from engine.runner.executor import ModelExecutor
from engine.runner.model_runner import ModelRunner
from engine.sampling.triton_sampler import TritonSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.no_proposer import NoProposer
from engine.speculation.proposer import ProposerNeeds
from engine.speculation.speculator import Speculator
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, SamplingParams
from loadtest.micro.measure import Row, parse_arguments, report
from loadtest.micro.steady import PARTS, medians, timed_step

BLOCK_SIZE = 16
VOCAB_SIZE = 128
NUM_DRAFTS = 3
NUM_WARMUP_STEPS, NUM_ROUNDS, NUM_STEPS = 20, 60, 30
MAX_TOKENS = 2 * (NUM_WARMUP_STEPS + NUM_ROUNDS * NUM_STEPS)  # of an answer, so that none ends
SIZES = [(1, 1024), (8, 1024), (64, 1024), (64, 4096), (256, 1024)]  # sequences, context
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)
TOKEN = 1  # what every row samples


class NoModel(Decoder):
    """Computes nothing. Is its own attention."""

    vocab_size = VOCAB_SIZE

    def __init__(self, max_num_rows: int) -> None:
        self.attention_layers = []
        self._hidden, self._logits = torch.zeros(max_num_rows, 1), torch.zeros(max_num_rows, VOCAB_SIZE)

    def forward(self, batch: ForwardBatch, attention: object) -> Tensor:
        return self._hidden[: len(batch.input_ids)]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._logits[: len(hidden)]

    def plan(self, batch: ForwardBatch) -> None:
        pass

    def plan_any_lengths(self, batch: ForwardBatch, rows_per_seq: int) -> None:
        pass

    def has_room(self, seq_lens: object, rows_per_seq: int) -> bool:
        return True


class NoGraph:
    def __init__(self, output: Tensor) -> None:
        self._output = output

    def replay(self) -> Tensor:
        return self._output


class NoGraphDevice:
    def capture(self, work: Callable[[], Tensor]) -> NoGraph:
        return NoGraph(work())


class WrongDrafts:
    needs = ProposerNeeds(num_drafts=NUM_DRAFTS)

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            seq.draft_token_ids, seq.draft_parents = [TOKEN + 1] * NUM_DRAFTS, list(range(-1, NUM_DRAFTS - 1))


def _sample_nothing(logits: Tensor, *arguments: Tensor, **settings: int) -> Tensor:
    return torch.full((len(logits),), TOKEN)


def make_engine(num_seqs: int, context: int, *, has_drafts: bool) -> Engine:
    proposer = WrongDrafts() if has_drafts else NoProposer()
    num_drafts, max_model_len = proposer.needs.num_drafts, context + MAX_TOKENS
    max_num_rows, builder = max(1024, num_seqs * (1 + num_drafts)), BatchBuilder(torch.device("cpu"))
    model: Any = NoModel(max_num_rows)  # also where a whole model, or an attention, is asked for
    limits = GraphLimits(
        max_num_seqs=num_seqs,
        max_rows_per_seq=1 + num_drafts,
        max_num_blocks=-(-max_model_len // BLOCK_SIZE) + 1,
        num_uses=0,
        num_steps_between=0,
    )
    graphs = GraphRunner(model, model, builder, limits=limits, graph_device=NoGraphDevice(), device=builder.device)
    cache = KVCache((), num_blocks=1, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32))
    runner = ModelRunner(model, cache, model, builder=builder, graphs=graphs)
    num_blocks = num_seqs * (max_model_len // BLOCK_SIZE + 2) + 2
    scheduler = Scheduler(
        KVCacheManager(num_blocks, BLOCK_SIZE),
        SchedulerLimits(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max_num_rows,
            max_model_len=max_model_len,
        ),
    )
    executor, speculator = ModelExecutor(runner, TritonSampler(VOCAB_SIZE)), Speculator(proposer, VOCAB_SIZE)
    return Engine(executor, scheduler, speculator, COST, overlap=not has_drafts)


def measure(num_seqs: int, context: int, *, has_drafts: bool) -> Row:
    """Microseconds: of the fastest round, since others that use the machine only ever add."""
    with patch("engine.sampling.triton_sampler.sample_tokens", _sample_nothing):
        engine = make_engine(num_seqs, context, has_drafts=has_drafts)
        for number in range(num_seqs):
            params = SamplingParams(seed=number, max_tokens=MAX_TOKENS, temperature=0.7)
            prompt = [number % VOCAB_SIZE] * context
            engine.add(Request(request_id=f"request-{number}", prompt_token_ids=prompt, params=params))
        while len(engine.scheduler.waiting) or any(seq.num_output_tokens == 0 for seq in engine.scheduler.running):
            engine.step()
        for _ in range(NUM_WARMUP_STEPS):
            engine.step()
        gc.collect()
        gc.freeze()  # as the engine process does
        rounds = [medians([timed_step(engine) for _ in range(NUM_STEPS)]) for _ in range(NUM_ROUNDS)]
        gc.unfreeze()
    times = min(rounds, key=lambda times: times.whole)
    kind = f"{NUM_DRAFTS} drafts" if has_drafts else "decode"
    row: Row = {"step": kind, "seqs": num_seqs, "context": context, "whole us": 1e6 * times.whole}
    return row | {f"{part} us": 1e6 * times.parts[part] for part in PARTS}


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    rows = [measure(*size, has_drafts=has_drafts) for has_drafts in (False, True) for size in SIZES]
    report("host-step", rows, arguments)


if __name__ == "__main__":
    main()
