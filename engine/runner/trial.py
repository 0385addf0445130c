"""One token through a whole engine before it serves: a model that cannot answer does not say that it is ready."""

from __future__ import annotations

import torch

from engine.memory_errors import is_out_of_memory
from engine.models.model_error import FOREIGN_ERRORS, ModelError
from engine.runner.executor import Executor
from engine.runner.step_builder import StepBuilder
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence

FIRST_BLOCK = 1  # after the null block; free, and written anew by whoever gets it


def item_of_no_request(
    builder: StepBuilder, *, first_block: int, num_drafts: int = 0, temperature: float = 1.0
) -> Scheduled:
    """Token 0 at position 0, and a run of drafts behind it, in the blocks from the first one on, whatever is there."""
    seq = _sequence(builder, 1, num_drafts, first_block=first_block, temperature=temperature)
    seq.draft_run([0] * num_drafts, [])
    return Scheduled(seq, 1 + num_drafts, num_drafts, samples=True)


def chunk_of_no_request(builder: StepBuilder, num_computed: int, num_new_tokens: int) -> Scheduled:
    """The last tokens of a prompt, behind so many that count as computed: whatever is in the blocks is their cache."""
    seq = _sequence(builder, num_computed + num_new_tokens, first_block=FIRST_BLOCK, temperature=0.0)
    seq.num_computed_tokens = num_computed
    return Scheduled(seq, num_new_tokens, 0, samples=True)


def _sequence(
    builder: StepBuilder, num_tokens: int, num_more: int = 0, *, first_block: int, temperature: float
) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=1, temperature=temperature)
    request = Request(request_id="trial", prompt_token_ids=[0], params=params)
    num_groups, num_blocks = builder.tables.num_groups, -(-(num_tokens + num_more) // builder.block_size)
    tables = [list(range(first_block, first_block + num_blocks)) for _ in range(num_groups)]
    return Sequence(request, [0] * num_tokens, block_tables=tables, num_released_blocks=[0] * num_groups)


def compute_one_token(executor: Executor, builder: StepBuilder, *, block: int) -> Sampled:
    """What follows token 0 at position 0. Its keys and values go into the block, whatever is there.

    Those of every group of layers, one after the other: each layer reads its own before the next one writes. builder:
    that of the executor's other steps, as they share its block tables
    """
    (sampled,) = executor.run(builder.build([item_of_no_request(builder, first_block=block)])).sampled
    builder.launched()
    return sampled


@torch.inference_mode()
def try_one_token(executor: Executor, builder: StepBuilder, *, path: str, dtype: torch.dtype) -> None:
    """Computes token 0 at position 0 and samples what follows. ModelError where a layer, the head or the sampler fails.

    Memory that runs out, or a device that is lost, is no fault of the model's, and is raised as it comes.
    """
    try:
        sampled = compute_one_token(executor, builder, block=FIRST_BLOCK)
    except torch.AcceleratorError:
        raise
    except FOREIGN_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{path} was loaded, but cannot compute a token: {type(error).__name__}: {error}; "
            "try model.implementation transformers or another checkpoint"
        ) from error
    if sampled.error is not None:
        raise ModelError(
            f"{path} was loaded, but the scores of its first token are not finite numbers in {_name(dtype)}; "
            f"{_advice(dtype)}"
        )


def _advice(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "set model.dtype to float32 or bfloat16, whose numbers are larger"
    return "its weights are damaged, or too large for its own arithmetic: download it again"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
