"""An engine without a model, for tests of the process border: tokens are a hash of the request, crashes are on order.

The child process loads this file by its path. The first prompt token orders what happens when the request is computed;
options stand in the config's model path, as in "scripted?delay=0.01&fail=model".
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable
from urllib.parse import parse_qs

from engine.config import EngineConfig
from engine.ipc.messages import ModelInfo, TokenizerAssets
from engine.types import Request, Scheduled, Sequence, StepOutput, StepStats, TokenLogprobs

EXIT, SEGFAULT, RAISE, HANG, POISONED, REFUSED, CRASH_WHEN_FRESH, GARBAGE, FORK, STALL = range(9001, 9011)
CHUNK = 8  # prompt tokens per step
CRASH_POSITION = 5  # where CRASH_WHEN_FRESH ends the process, unless the request is a replay


def token_at(request: Request, position: int) -> int:
    key = repr((request.prompt_token_ids, request.params.seed, position)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=2).digest(), "little")


def expected_tokens(request: Request) -> list[int]:
    return [token_at(request, position) for position in range(request.params.max_tokens)]


def expected_prompt_logprobs(request: Request) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(token, -float(index + 1), 1, [token], [-0.5])
        for index, token in enumerate(request.prompt_token_ids)
    ]


class ModelError(ValueError):
    kind = "model"


class MemoryPlanError(ValueError):
    kind = "memory"


class ScriptedEngine:
    def __init__(self, *, delay: float, max_num_seqs: int) -> None:
        self.on_batch: Callable[[list[Scheduled]], None] = lambda batch: None
        self._delay, self._max_num_seqs = delay, max_num_seqs
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSED:
            raise ValueError("the request cannot fit")
        name = request.request_id
        assert name not in self._waiting, "added twice"
        assert name not in self._running, "added twice"
        self._waiting[name] = Sequence(request, request.prompt_token_ids + request.output_token_ids)

    def abort(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def step(self) -> tuple[list[StepOutput], list[str], StepStats | None]:
        self._num_steps += 1
        started = list(self._waiting)[: self._max_num_seqs - len(self._running)]
        for name in started:
            self._running[name] = self._waiting.pop(name)
        if any(_stalls(seq) for seq in self._running.values()):
            time.sleep(self._delay)
            return [], [], self._stats(0)
        batch = [Scheduled(seq, CHUNK, 0, samples=True) for seq in self._running.values()]
        if batch:
            self.on_batch(batch)
            time.sleep(self._delay)
        outputs = [output for item in batch if (output := self._compute(item.seq)) is not None]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        return outputs, started, self._stats(len(batch))

    def _compute(self, seq: Sequence) -> StepOutput | None:
        obey(seq)
        request = seq.request
        start = seq.num_computed_tokens
        seq.num_computed_tokens = min(start + CHUNK, seq.num_prompt_tokens)
        scored = None
        if request.params.prompt_logprobs is not None and start < seq.num_prompt_tokens:
            scored = expected_prompt_logprobs(request)[start : seq.num_computed_tokens]
        name = request.request_id
        if seq.num_computed_tokens < seq.num_prompt_tokens:
            return None if scored is None else StepOutput(request_id=name, prompt_logprobs=scored)
        if request.prompt_token_ids[0] == POISONED:
            return StepOutput(request_id=name, finish_reason="error", error="the logits are not finite")
        position = seq.num_output_tokens
        end = min(position + 1 + (self._num_steps + position) % 3, request.params.max_tokens)  # as if drafts were taken
        token_ids = [token_at(request, place) for place in range(position, end)]
        seq.token_ids += token_ids
        reason = "length" if end == request.params.max_tokens else None
        return StepOutput(request_id=name, token_ids=token_ids, prompt_logprobs=scored, finish_reason=reason)

    def _stats(self, num_seqs: int) -> StepStats:
        return StepStats(
            num_tokens=num_seqs,
            num_seqs=num_seqs,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            schedule=0,
            forward=self._delay,
            sample=0,
            update=0,
            propose=0,
            num_blocks=100,
            num_owned_blocks=len(self._running),
            num_cached_blocks=0,
            num_preemptions=0,
            num_prefix_queries=0,
            num_prefix_hits=0,
            num_drafts=0,
            num_draft_tokens=0,
            accepted_by_position=[],
            bytes_moved=0,
            flops=0,
        )


def _stalls(seq: Sequence) -> bool:
    """Whether its engine goes around in circles from now on."""
    is_fresh = not seq.request.output_token_ids and seq.num_output_tokens >= CRASH_POSITION
    return is_fresh and seq.request.prompt_token_ids[0] == STALL


def obey(seq: Sequence) -> None:
    order = seq.request.prompt_token_ids[0]
    if order == EXIT:
        os._exit(7)
    if order == SEGFAULT:
        ctypes.string_at(0)
    if order == RAISE:
        raise RuntimeError("the step failed on order")
    if order == HANG:
        time.sleep(1000)
    if order == CRASH_WHEN_FRESH and not seq.request.output_token_ids and seq.num_output_tokens >= CRASH_POSITION:
        os._exit(7)
    if order == GARBAGE and not seq.request.output_token_ids and seq.num_output_tokens >= CRASH_POSITION:
        os.write(int(sys.argv[1]), b"\xff" * 64)
        time.sleep(1000)
    if order == FORK and not seq.request.output_token_ids and seq.num_output_tokens >= CRASH_POSITION:
        if os.fork() == 0:  # a grandchild that holds the socket and the pipes open
            time.sleep(3)
            os._exit(0)
        os._exit(7)


def fail(order: str) -> None:
    errors = {
        "config": ValueError("set a lower scheduler.max_num_seqs"),
        "model": ModelError("no such model; give a path"),
        "memory": MemoryPlanError("needs 9 GiB, has 1 GiB"),
        "memory_error": MemoryError("no more"),
        "torch_memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    }
    if order in errors:
        raise errors[order]
    if order == "chained":
        try:
            raise KeyError("the root cause")
        except KeyError as error:
            raise RuntimeError("the outer error") from error
    if order == "exit":
        print("the last line of output", file=sys.stderr, flush=True)
        os._exit(9)
    if order == "kill":
        os.kill(os.getpid(), 9)
    if order == "hang":
        time.sleep(1000)


def build(config: EngineConfig, report: Callable[[str, str], None]) -> tuple[ScriptedEngine, ModelInfo]:
    options = {name: values[0] for name, values in parse_qs(config.model.path.partition("?")[2]).items()}
    report("weights", "half of them")
    fail(options.get("fail", ""))
    engine = ScriptedEngine(
        delay=float(options.get("delay", "0.002")), max_num_seqs=int(options.get("max_num_seqs", "64"))
    )
    model = ModelInfo(
        path=config.model.path,
        architecture="Scripted",
        num_parameters=int(float(options.get("num_parameters", "0"))),
        vocab_size=65536,
        trained_context=4096,
        max_model_len=4096,
        num_kv_tokens=1600,
        eos_token_ids=[0],
        generation_defaults={},
        tokenizer=TokenizerAssets(tokenizer_json="{}", chat_template=None, special_tokens={}),
        fingerprint="fp_scripted",
        settings={},
        phase_seconds={},
        bytes_per_second=0,
        flops_per_second=float(options.get("flops_per_second", "0")),
    )
    return engine, model
