"""An engine client without an engine: a tokenizer made on the spot, and answers that a script gives."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Self

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.client.client import EngineError
from engine.client.outbox import Outbox
from engine.ipc.messages import ModelInfo, TokenizerAssets
from engine.types import Request, RequestTiming, StepOutput, TokenLogprobs
from server.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if shout is defined and shout %}SHOUT{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world of tokens, the quick brown fox jumps over the lazy dog. 你好 世界 🙂🚀 naïve café"] * 3
CONTEXT = 256
HIDDEN_SIZE = 4


@cache
def make_assets(template: str | None = CHAT_TEMPLATE) -> TokenizerAssets:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return TokenizerAssets(
        tokenizer_json=backend.to_str(),
        chat_template=template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


@cache
def make_tokenizer(template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(make_assets(template))


def make_model(assets: TokenizerAssets, vocab_size: int) -> ModelInfo:
    return ModelInfo(
        path="/models/tiny",
        architecture="Tiny",
        num_parameters=1,
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        trained_context=CONTEXT,
        max_model_len=CONTEXT,
        num_kv_tokens=10 * CONTEXT,
        eos_token_ids=[1],
        generation_defaults={},
        tokenizer=assets,
        fingerprint="fp_test",
        settings={},
        weights={"layers.mlp.down_proj": {"int4": 29, "float16": 1}, "lm_head": {"int8": 1}},
        phase_seconds={},
        bytes_per_second=0.0,
        flops_per_second=0.0,
    )


class FakeEngine:
    """An engine client that says what a script says; without one, tokens that follow from prompt and seed."""

    def __init__(self, model: ModelInfo, tokenizer: Tokenizer) -> None:
        self.model: ModelInfo | None = model
        self.tokenizer = tokenizer
        self.state, self.phase, self.phase_detail, self.failure = "ready", "ready", "", None
        self.num_restarts = self.num_waiting = self.num_waiting_tokens = self.num_running = 0
        self.num_background_waiting = self.num_background_waiting_tokens = 0
        self.script: Callable[[Request], list[int]] = self.invent
        self.step_size = 1  # tokens per output
        self.first_delay = self.delay = 0.0  # seconds before the first and before each further output
        self.first_timing: RequestTiming | None = None  # told with the first token
        self.fail_after: int | None = None  # outputs, then the request fails
        self.failure_kind = "request"  # of the EngineError
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.num_cached_tokens = 0

    def say(self, text: str) -> None:
        """From now on every answer is this text and an end of sequence."""
        self.script = lambda request: [*self.tokenizer.encode(text, add_special_tokens=False), 1]

    def invent(self, request: Request) -> list[int]:
        key = f"{request.prompt_token_ids}:{request.params.seed}".encode()
        digest = hashlib.shake_128(key).digest(request.params.max_tokens)
        return [4 + byte for byte in digest]

    def generate(self, requests: Sequence[Request]) -> FakeStream:
        return FakeStream(self, requests)

    async def answer(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        await asyncio.sleep(self.first_delay)
        for number, output in enumerate(self.outputs(request)):
            if number == self.fail_after:
                raise EngineError("the engine broke", kind=self.failure_kind)
            if number:
                await asyncio.sleep(self.delay)
            yield output

    def outputs(self, request: Request) -> Iterator[StepOutput]:
        params = request.params
        if request.pooling is not None:
            vector = struct.pack("<4f", len(request.prompt_token_ids), request.prompt_token_ids[-1], 1, 2)
            yield StepOutput(request_id=request.request_id, finish_reason="stop", pooled=vector, timing=self.timing(0))
            return
        tokens = self.script(request)[: params.max_tokens]
        stop_at = next((i for i, token in enumerate(tokens) if token in params.stop_token_ids), None)
        tokens = tokens if stop_at is None else tokens[: stop_at + 1]
        if params.prompt_logprobs is not None:
            scored = [self.logprobs(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
            half = len(scored) // 2
            yield StepOutput(request_id=request.request_id, prompt_logprobs=scored[:half])
            yield StepOutput(request_id=request.request_id, prompt_logprobs=scored[half:])
        for start in range(0, len(tokens), self.step_size):
            chunk = tokens[start : start + self.step_size]
            is_last = start + self.step_size >= len(tokens)
            is_stop = is_last and stop_at is not None
            yield StepOutput(
                request_id=request.request_id,
                token_ids=chunk,
                finish_reason=("stop" if is_stop else "length") if is_last else None,
                stop_token_id=chunk[-1] if is_stop else None,
                logprobs=None if params.logprobs is None else [self.logprobs(t, params.logprobs) for t in chunk],
                num_cached_tokens=self.num_cached_tokens,
                timing=self.timing(len(tokens)) if is_last else self.first_timing if start == 0 else None,
            )

    def logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        top = [(token_id + i) % 330 for i in range(num_top)]
        return TokenLogprobs(token_id, -0.5, 1, top, [-0.5 - i for i in range(num_top)])

    def timing(self, num_tokens: int) -> RequestTiming:
        return RequestTiming(
            queued=0.0, prefill=0.0, decode=0.0, num_prefill_chunks=1, num_preemptions=0,
            num_drafts=num_tokens, num_accepted_drafts=num_tokens // 2,
        )  # fmt: skip


class FakeStream(AbstractContextManager):
    """What a FakeEngine puts out for one reader. A request that is left before its last output was taken is aborted."""

    def __init__(self, engine: FakeEngine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = requests
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of the requests that have not ended
        self._outbox = Outbox()
        self.fail, self.cut = self._outbox.fail, self._outbox.cut

    def __enter__(self) -> Self:
        for request in self._requests:
            self._engine.requests.append(request)
            self._engine.running.add(request.request_id)
            self._tasks[request.request_id] = asyncio.ensure_future(self._tell(request))
        return self

    def __exit__(self, *_: object) -> None:
        for request_id in list(self._tasks):
            self.leave(request_id)

    async def take(self, max_num: int) -> list[StepOutput]:
        outputs = await self._outbox.take(max_num)
        for output in outputs:
            if output.finish_reason is not None and self._tasks.pop(output.request_id, None) is not None:
                self._engine.running.discard(output.request_id)
        return outputs

    def leave(self, request_id: str) -> None:
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()
            self._engine.running.discard(request_id)
            self._engine.aborted.append(request_id)

    async def _tell(self, request: Request) -> None:
        try:
            async for output in self._engine.answer(request):
                self._outbox.put(output)
        except Exception as error:  # the engine's, or a bug that a test has made
            self._outbox.fail(error)


def make_engine(template: str | None = CHAT_TEMPLATE) -> FakeEngine:
    return FakeEngine(make_model(make_assets(template), 330), make_tokenizer(template))
