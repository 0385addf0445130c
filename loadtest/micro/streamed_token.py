"""What does the server do for a streamed token? `python -m loadtest.micro.streamed_token [--save]`

Microseconds of CPU time per token, from the bytes of the engine process's frame to those that go to the sockets,
counters and HTTP included, by the number of streams that run beside one another. The whole application runs in this
process, on its event loop, without sockets and without an engine: frames are made up, and what is written is counted.
"deadline": each request has one. "4 choices": each stream has four.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time

import uvloop
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from uvicorn.server import ServerState

from engine.client.client import EngineClient, EngineObserver
from engine.client.supervisor import EngineState
from engine.config import EngineConfig
from engine.ipc.framing import FrameReader, encode_frame, from_engine_decoder
from engine.ipc.messages import Add, FromEngine, ModelInfo, Step, ToEngine, TokenizerAssets
from engine.types import StepOutput, StepStats
from loadtest.micro.measure import Row, parse_arguments, report
from server.app import create_app
from server.cli.serve import make_http_server
from server.config import Config
from server.http.http_protocol import HttpProtocol
from server.http.intake import Intake

VOCABULARY = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
WORDS = [VOCABULARY[letter] for letter in "tokens"]
MAX_TOKENS = 100_000  # of an answer, so that none ends
NUM_ROUNDS, NUM_WARMUP_STEPS = 5, 20
NUM_STEPS = {1: 500, 64: 100}  # of a round, by streams
STATS = StepStats(
    num_tokens=64, num_seqs=64, num_running=64, num_waiting=0, schedule=1e-4, forward=5e-3, sample=1e-4, update=1e-4,
    propose=1e-6, num_blocks=1000, num_owned_blocks=64, num_cached_blocks=0, num_preemptions=0, num_prefix_queries=0,
    num_prefix_hits=0, num_drafts=0, num_draft_tokens=0, accepted_by_position=[], bytes_moved=1, flops=1,
    num_output_tokens=64,
)  # fmt: skip


class TalkingEngine(EngineClient):
    """The client of an engine process that is not there: `step` makes up the frame that it would send."""

    def __init__(self, config: EngineConfig, observer: EngineObserver) -> None:
        super().__init__(config, observer)
        self._observer = observer
        self._ids: list[str] = []
        self._reader: FrameReader[FromEngine] = FrameReader(from_engine_decoder())
        self._num_steps = self._num_received = 0

    async def start(self) -> None:
        model = make_model()
        self._supervisor.state, self._supervisor.model = EngineState.READY, model
        self._observer.on_ready(model)
        self._dispatcher.engine_ready(self._receive, model)

    async def stop(self) -> None:
        self._dispatcher.engine_gone("stopped", "the benchmark is over")

    def _receive(self, message: ToEngine) -> int:
        self._num_received += 1
        if isinstance(message, Add):
            self._ids.append(message.request.request_id)
        return self._num_received

    @property
    def num_requests(self) -> int:
        return len(self._ids)

    def forget_requests(self) -> None:
        self._ids.clear()

    def make_frame(self) -> bytes:
        self._num_steps += 1
        token_ids = [WORDS[self._num_steps % len(WORDS)]]
        outputs = [StepOutput(request_id=name, token_ids=token_ids) for name in self._ids]
        return bytes(encode_frame(Step(outputs, [], STATS, self._num_received)))

    def take(self, frame: bytes) -> None:
        """What the supervisor does with what comes."""
        for message in self._reader.feed(frame):
            assert isinstance(message, Step)
            assert message.stats is not None
            self._observer.on_step(message.stats)
            self._dispatcher.engine_stepped(message)


def make_model() -> ModelInfo:
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return ModelInfo(
        path="talking", architecture="Talking", num_parameters=0, vocab_size=len(VOCABULARY), settings={},
        trained_context=2 * MAX_TOKENS, max_model_len=2 * MAX_TOKENS, num_kv_tokens=2 * MAX_TOKENS, eos_token_ids=[],
        generation_defaults={}, fingerprint="fp_talking", phase_seconds={}, bytes_per_second=0, flops_per_second=0,
        tokenizer=TokenizerAssets(tokenizer_json=backend.to_str(), chat_template=template, special_tokens={}),
    )  # fmt: skip


class Wire(asyncio.Transport):
    """What the connections write to: counts the events of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_events = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        assert not data.startswith(b"HTTP/1.1 ") or data.startswith(b"HTTP/1.1 200 "), data
        self.num_events += data.count(b"data: {")

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is open."""

    def pause_reading(self) -> None:
        """Nothing comes."""

    def resume_reading(self) -> None:
        """Nothing comes."""


class Server:
    """The application behind the HTTP protocol, to which connections are made without sockets."""

    def __init__(self, app: FastAPI, config: Config) -> None:
        self._settings = config
        self._config = make_http_server(app, config, lifespan="off").config
        self._config.load()
        operation = config.operation
        self._intake = Intake(max_connections=operation.max_connections, max_held_bytes=operation.max_total_head_bytes)
        self._state = ServerState()
        self.wire = Wire()

    def connect(self, path: str, body: dict[str, object]) -> asyncio.Protocol:
        """A connection that has asked."""
        protocol = HttpProtocol(self._config, self._state, {}, settings=self._settings, intake=self._intake)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        protocol.connection_made(self.wire)
        protocol.data_received(head.encode() + b"\r\n\r\n" + content)
        return protocol

    async def disconnect(self, protocols: list[asyncio.Protocol]) -> None:
        for protocol in protocols:
            protocol.connection_lost(None)
        await asyncio.gather(*self._state.tasks)


async def measure(server: Server, engine: TalkingEngine, path: str, body: dict[str, object], num_streams: int) -> float:
    """Microseconds per token."""
    num_tokens = num_streams * int(str(body.get("n", 1)))  # of a step
    wire = server.wire
    connections = [server.connect(path, body) for _ in range(num_streams)]
    while engine.num_requests < num_tokens:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for _ in range(NUM_WARMUP_STEPS):
        engine.take(engine.make_frame())
        await asyncio.sleep(0.002)
    spent = 0.0
    for _ in range(NUM_STEPS[num_streams]):
        frame = engine.make_frame()
        expected = wire.num_events + num_tokens
        started_at = time.process_time()
        engine.take(frame)
        await asyncio.sleep(0)
        while wire.num_events < expected:  # noqa: ASYNC110
            await asyncio.sleep(0)
        spent += time.process_time() - started_at
    await server.disconnect(connections)
    engine.forget_requests()
    return 1e6 * spent / (NUM_STEPS[num_streams] * num_tokens)


async def measure_all() -> list[Row]:
    completion = {"model": "talking", "prompt": "hello", "stream": True, "max_tokens": MAX_TOKENS}
    chat = completion | {"messages": [{"role": "user", "content": "hello"}]}
    del chat["prompt"]
    cases: dict[str, tuple[str, dict[str, object]]] = {
        "completion": ("/v1/completions", {**completion}),
        "chat": ("/v1/chat/completions", {**chat}),
        "chat, deadline": ("/v1/chat/completions", {**chat, "timeout": 600}),
        "chat, 4 choices": ("/v1/chat/completions", {**chat, "n": 4}),
    }
    engines: list[TalkingEngine] = []

    def make_engine(config: EngineConfig, observer: EngineObserver) -> EngineClient:
        engines.append(TalkingEngine(config, observer))
        return engines[0]

    config = Config.model_validate({"model": {"path": "talking"}})
    app = create_app(config, make_engine=make_engine)
    server = Server(app, config)
    rows: list[Row] = []
    async with app.router.lifespan_context(app):
        while app.state.server.tokenizer is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        gc.collect()
        gc.freeze()
        for case, (path, body) in cases.items():
            row: Row = {"stream": case}
            for size in NUM_STEPS:
                times = [await measure(server, engines[0], path, body, size) for _ in range(NUM_ROUNDS)]
                row[f"us a token, {size} streams"] = statistics.median(times)
            rows.append(row)
    return rows


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    report("streamed-token", uvloop.run(measure_all()), arguments)


if __name__ == "__main__":
    main()
