"""The peer that is on every such machine: transformers' continuous batching, with the same random weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from loadtest.gpu.context import Context
from loadtest.gpu.end_to_end import Case, allow, cases_of, num_prefill_steps, random_prompts
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.shapes import Load
from loadtest.micro.shapes import Shape

NAME = "transformers"
_START = 6.0  # seconds: it makes its cache and captures its graphs for each batch


def time_transformers(context: Context, shape: Shape, load: Load, *, num_jobs_left: int) -> Iterator[Record]:
    """Timings of the same names as the engine's, with the peer's behind them."""
    allowance = allow(context, num_jobs_left=num_jobs_left, overhead=_START)
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    with shape.folder(max_length=load.max_length) as folder, torch.device(context.device):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for case in sorted(cases_of(load), key=lambda case: case.length):  # one length in full before the next
        if not allowance.has_room_for(shape, case, load.num_outputs):
            yield Problem(f"{NAME}, {shape.name}, {case}", "left out for want of time")
            continue
        yield from _time_case(context, model, shape, case, num_outputs=load.num_outputs)


def _time_case(context: Context, model: Any, shape: Shape, case: Case, *, num_outputs: int) -> Iterator[Record]:
    """From the moments at which tokens came: what is compiled and captured before the first one does not count."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    num_wanted = num_outputs + num_prefill_steps(case)
    generation = GenerationConfig(max_new_tokens=num_wanted, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = {"num_blocks": 8, "max_batch_tokens": 64} if context.is_rehearsal else {}
    answers = model.generate_batch(
        random_prompts(context, shape, case),
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **sizes),
        record_timestamps=True,
    )
    finished = [answer for answer in answers.values() if answer.error is None and answer.timestamps]
    title = f"{shape.name}, {case}, {NAME}"
    if len(finished) < case.batch:
        errors = [answer.error for answer in answers.values() if answer.error is not None]
        yield Problem(title, f"{len(finished)} of {case.batch} answers; {errors[0] if errors else 'no error named'}")
        return
    start = min(answer.created_time for answer in finished)
    last_first = max(answer.timestamps[0] for answer in finished)
    yield Timing(f"prefill, {title}", last_first - start, num_tokens=case.batch * case.length)
    moments = [moment for moment in finished[0].timestamps if moment >= last_first]
    steps = [after - before for before, after in pairwise(moments)]
    if len(steps) < 4:
        yield Problem(f"decode, {title}", "the first answer was over before the last one had begun")
        return
    yield Timing(f"decode, {title}", statistics.median(steps[len(steps) // 4 :]), num_tokens=case.batch)
