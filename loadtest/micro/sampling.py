"""What does choosing the tokens of a step cost here? `python -m loadtest.micro.sampling [--threads 2] [--save]`

Microseconds per step, and dispatcher calls, for logits of SmolLM2's and of Qwen's vocabulary that look like a language
model's. A step's inputs are built too; numpy's passes run on one thread, compiled ones on all.
The floor is reading the logits once at the speed that this machine reads memory. It decides how `engine.sampling`
looks for the largest logit, and that penalties keep what they know of a sequence from step to step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.planning.ceilings import measure_ceilings
from engine.runner.step_builder import StepBuilder
from engine.sampling.host_sampler import HostSampler
from engine.sampling.numba_sampler import NumbaSampler
from engine.types import Request, SamplingParams, Scheduled, Sequence
from loadtest.micro.measure import Row, fastest, parse_arguments, report

VOCAB_SIZES = [49152, 151936]
BATCHES = [1, 32]
NUM_LOGITS = 8  # sets of them, so that they do not all stay in the cache
WAYS: dict[str, tuple[int, dict[str, float]]] = {  # context, parameters
    "greedy": (128, {"temperature": 0.0}),
    "temperature 1": (128, {}),
    "temperature 0.7": (128, {"temperature": 0.7}),
    "top-p 0.9": (128, {"top_p": 0.9}),
    "top-k 50": (128, {"top_k": 50}),
    "logprobs 5": (128, {"temperature": 0.0, "logprobs": 5}),
    "presence": (4096, {"temperature": 0.0, "presence_penalty": 0.5}),
    "repetition": (4096, {"temperature": 0.0, "repetition_penalty": 1.1}),
}


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    arguments = parse_arguments(main.__doc__ or __doc__ or "")
    bytes_per_second, _ = measure_ceilings(arguments.threads)
    rows = [
        _measure(size, num_seqs, way, arguments.threads, bytes_per_second)
        for size in VOCAB_SIZES
        for num_seqs in BATCHES
        for way in WAYS
    ]
    report("sampling", rows, arguments)


def _measure(vocab_size: int, num_seqs: int, way: str, num_threads: int, bytes_per_second: float) -> Row:
    context, fields = WAYS[way]
    params = SamplingParams(**{"seed": 1, "max_tokens": 9, **fields})  # type: ignore[arg-type]
    logits = [_logits(num_seqs, vocab_size) for _ in range(NUM_LOGITS)]
    row: Row = {"vocabulary": vocab_size, "batch": num_seqs, "way": way}
    samplers = {"numpy us": HostSampler(vocab_size), "numba us": NumbaSampler(vocab_size, num_threads=num_threads)}
    for name, sampler in samplers.items():
        batch = [_item(params, context) for _ in range(num_seqs)]
        work = partial(_step, sampler, StepBuilder(16, vocab_size), logits, batch)
        row[name] = 1e6 * fastest(work, num_calls=NUM_LOGITS)
    row["floor us"] = 1e6 * logits[0].numel() * logits[0].element_size() / bytes_per_second
    with _Calls() as calls:
        work(0)
    row["calls"] = calls.num_calls
    return row


def _step(
    sampler: HostSampler, builder: StepBuilder, logits: list[torch.Tensor], batch: list[Scheduled], index: int
) -> None:
    inputs = builder.build(batch)
    results = sampler.launch(logits[index], inputs.sampling).finish(inputs)
    for item, result in zip(batch, results, strict=True):
        item.seq.token_ids += result.token_ids
        item.seq.num_computed_tokens += 1


def _item(params: SamplingParams, context: int) -> Scheduled:
    token_ids = torch.randint(min(VOCAB_SIZES), (context,)).tolist()
    num_output_tokens = context // 2
    request = Request(request_id="", prompt_token_ids=token_ids[num_output_tokens:], params=params)
    seq = Sequence(request, token_ids)
    seq.num_computed_tokens = context - 1
    seq.block_tables = [[1] * (2 * context)]  # nobody looks
    return Scheduled(seq, 1, 0, samples=True)


def _logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Most tokens are about ten below the best few: what a model that knows what comes next says."""
    logits = 2.5 * torch.randn(num_rows, vocab_size)
    logits[:, :20] += 8.0
    return logits


if __name__ == "__main__":
    main()
