"""What does the host do before a step can run? `python -m loadtest.micro.forward_batch [--save]`

Microseconds to turn a plan of the scheduler into one step's tensors, on the CPU: for steps in which every sequence
decodes one token, for those that verify drafts, and for a prompt chunk beside decoding ones. Each call finds every
sequence one token further than the last. "anew" makes the batch without what is kept between steps.
"""

from __future__ import annotations

from functools import partial

import torch

from engine.batch.device_inputs import BatchBuilder
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence
from loadtest.micro.measure import Row, fastest, parse_arguments, report

BLOCK_SIZE = 16
DEVICE = torch.device("cpu")
STEPS = {"decode": (0, 0), "4 drafts": (4, 0), "decode, 512 prompt tokens": (0, 512)}  # drafts, prompt tokens
SIZES = [(1, 512), (8, 512), (64, 512), (64, 4096), (256, 512), (256, 4096)]  # sequences, context
NUM_CALLS = 30
Builders = tuple[StepBuilder, BatchBuilder]
MAX_CALLS = 300  # of all rounds together


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    rows = [_measure(kind, *size) for kind in STEPS for size in SIZES]
    report("forward-batch", rows, arguments)


def _measure(kind: str, num_seqs: int, context: int) -> Row:
    num_drafts, num_prompt_tokens = STEPS[kind]
    batch = [_scheduled(context, 1 + num_drafts, num_drafts) for _ in range(num_seqs)]
    if num_prompt_tokens:
        batch.append(_scheduled(num_prompt_tokens, num_prompt_tokens, 0))
    kept = fastest(partial(_build_next, _builders(), batch), num_calls=NUM_CALLS)
    anew = fastest(lambda _: _build(_builders(), batch), num_calls=3)
    return {"step": kind, "seqs": num_seqs, "context": context, "us": 1e6 * kept, "anew us": 1e6 * anew}


def _builders() -> Builders:
    return StepBuilder(BLOCK_SIZE, vocab_size=1), BatchBuilder(DEVICE)


def _build_next(builders: Builders, batch: list[Scheduled], _: int) -> None:
    for item in batch:  # some tens of nanoseconds each
        seq = item.seq
        seq.num_computed_tokens += 1
        if seq.num_computed_tokens + item.num_new_tokens > len(seq.block_table) * BLOCK_SIZE:
            seq.block_table.append(1)
    _build(builders, batch)


def _build(builders: Builders, batch: list[Scheduled]) -> None:
    inputs, tensors = builders
    tensors.build(inputs.build(batch))
    inputs.launched()


def _scheduled(context: int, num_new_tokens: int, num_drafts: int) -> Scheduled:
    """A sequence whose newest token is the last of `context`, with room to go on."""
    params = SamplingParams(seed=0, max_tokens=1)
    token_ids = [0] * (context + MAX_CALLS)
    seq = Sequence(Request(request_id="", prompt_token_ids=[], params=params), token_ids)
    seq.num_computed_tokens = context + num_drafts - num_new_tokens
    seq.draft_token_ids, seq.draft_parents = [0] * num_drafts, list(range(-1, num_drafts - 1))
    seq.block_tables = [[1] * -(-(context + num_drafts) // BLOCK_SIZE)]
    return Scheduled(seq, num_new_tokens, num_drafts, samples=True)


if __name__ == "__main__":
    main()
