"""Grammars of requests, compiled before the request is queued, in processes that may be killed.

So a grammar that cannot be enforced is a 400 that says why, and one that never ends costs a process, not the engine.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engine.grammar import GrammarSpec
from engine.ipc.messages import ModelInfo
from server.errors import ApiError, bad_request
from server.structured.grammar_worker import Check, Checked, Vocabulary
from server.structured.schema_errors import path_text
from server.text.worker_limits import frame
from server.text.worker_processes import WorkerEndedError, WorkerProcesses

NUM_WORKERS = 2  # so that one grammar that takes all its time does not hold up every other
MAX_WAITING = 64  # different grammars that are being compiled, or wait for it
MAX_KEPT = 512  # answers
MAX_KEPT_BYTES = 16 << 20  # of their grammars
Outcome = str  # compiled, cached, refused


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Of one grammar: bytes of its text, processor seconds and bytes of memory of compiling it."""

    max_text_bytes: int = 1 << 20
    max_seconds: float = 2.0
    max_memory_bytes: int = 512 << 20


class GrammarChecker:
    """Compiles each grammar once, for all who ask. Used in the server's event loop.

    on_checked: hears of each request's grammar what came of it, and of a new one the seconds that it took
    """

    def __init__(
        self,
        limits: GrammarLimits | None = None,
        on_checked: Callable[[Outcome, float | None], None] = lambda outcome, seconds: None,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._on_checked = on_checked
        self._workers: WorkerProcesses | None = None
        self._known: OrderedDict[GrammarSpec, Checked] = OrderedDict()
        self._num_known_bytes = 0
        self._running: dict[GrammarSpec, asyncio.Task[Checked]] = {}

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    async def check(self, spec: GrammarSpec, model: ModelInfo, *, param: str) -> GrammarSpec:
        """The grammar as the engine takes it. Raises ApiError: 400 where it is refused, 429 where too many wait.

        param: the field of the request that it came from
        """
        num_bytes = len(spec.text.encode(errors="replace"))
        if num_bytes > self.limits.max_text_bytes:
            self._on_checked("refused", None)
            raise bad_request(
                f"{param}: {num_bytes} bytes are more than the {self.limits.max_text_bytes} that "
                "limits.max_grammar_bytes allows; simplify it",
                param=param,
            )
        checked = self._known.get(spec)
        if checked is not None:
            self._known.move_to_end(spec)
            self._on_checked("refused" if checked.spec is None else "cached", None)
        else:
            is_first = spec not in self._running
            checked = await self._check_new(spec, model)
            outcome = "refused" if checked.spec is None else "compiled" if is_first else "cached"
            self._on_checked(outcome, checked.seconds if is_first else None)
        if checked.spec is None:
            place = path_text(checked.path)
            where = f" (at {place.removeprefix('.')})" if place else ""
            raise bad_request(f"{param}: {checked.reason}{where}", param=param + place)
        return checked.spec

    async def _check_new(self, spec: GrammarSpec, model: ModelInfo) -> Checked:
        task = self._running.get(spec)
        if task is None:
            if len(self._running) >= MAX_WAITING:
                raise ApiError(429, f"{len(self._running)} other grammars are being compiled; try again later")
            task = self._running[spec] = asyncio.create_task(self._ask(spec, model))
            task.add_done_callback(lambda done: self._keep(spec, done))
        return await asyncio.shield(task)  # a client that leaves takes it from nobody else

    async def _ask(self, spec: GrammarSpec, model: ModelInfo) -> Checked:
        limits = self.limits
        if self._workers is None:
            vocabulary = Vocabulary(model.tokenizer.tokenizer_json, model.vocab_size, model.eos_token_ids)
            self._workers = WorkerProcesses(
                "server.structured.grammar_worker",
                NUM_WORKERS,
                name="grammar-compiler",
                greeting=lambda: frame(vocabulary),
            )
        request = Check(spec, limits.max_seconds, limits.max_memory_bytes)
        try:
            answer = await self._workers.ask(lambda: frame(request), limits.max_seconds)
        except UnicodeEncodeError as error:
            return Checked(None, 0.0, f"it has characters that are none: {error.reason}")
        except WorkerEndedError as ended:
            if not ended.was_limit:
                raise ApiError(503, "the process that compiles grammars was killed, twice; try again later") from ended
            megabytes = limits.max_memory_bytes >> 20
            reason = (
                f"it took more than {limits.max_seconds:g} s of processor time to compile, or {megabytes} MiB of "
                "memory, or is nested too deeply; simplify it"
            )
            return Checked(None, limits.max_seconds, reason)
        return msgspec.msgpack.decode(answer, type=Checked)

    def _keep(self, spec: GrammarSpec, task: asyncio.Task[Checked]) -> None:
        del self._running[spec]
        if task.cancelled() or task.exception() is not None:
            return
        self._known[spec] = task.result()
        self._num_known_bytes += len(spec.text)
        while len(self._known) > MAX_KEPT or self._num_known_bytes > MAX_KEPT_BYTES:
            left, _ = self._known.popitem(last=False)
            self._num_known_bytes -= len(left.text)
