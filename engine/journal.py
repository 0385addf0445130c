"""What the server must remember of each request so that a new engine process can go on where the old one died."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from engine.types import Request, StepOutput

MAX_CRASHES = 2  # a request in the batch at so many crashes, without progress in between, is not tried again


class EngineError(RuntimeError):
    """The request cannot be finished. The message is for the client.

    kind: "request" (this one failed in the engine), "quarantined" (the engine died of it, it seems), "engine_failed"
    (the engine will not come back) or "stopped" (the server ends).
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(eq=False, slots=True)
class Entry:
    """One request between its registration and its end."""

    request: Request
    registered_at: float  # seconds, time.monotonic
    emitted: list[int]
    outbox: asyncio.Queue[StepOutput | EngineError] = field(default_factory=asyncio.Queue)
    add_number: int = 0  # number of its Add frame to the process that runs; 0: not sent
    is_running: bool = False  # the process that runs has started it
    has_run: bool = False  # some process has
    is_over: bool = False  # its last output or its error is in the outbox
    num_crashes: int = 0  # since its last progress
    num_prompt_logprobs: int = 0  # delivered
    num_repeated_logprobs: int = 0  # prompt log-probabilities of a replay that were delivered before its crash

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.emitted)

    def resumed(self) -> Request:
        """The request as a process that knows nothing of it must get it."""
        return msgspec.structs.replace(self.request, output_token_ids=list(self.emitted))

    def accept(self, output: StepOutput) -> StepOutput | None:
        """Notes what the client is about to get. None: it has all of it already."""
        if output.prompt_logprobs is not None:
            output = self._without_repeats(output)
        self.emitted += output.token_ids
        is_news = bool(output.token_ids or output.prompt_logprobs or output.finish_reason)
        return output if is_news else None

    def _without_repeats(self, output: StepOutput) -> StepOutput:
        assert output.prompt_logprobs is not None
        num_repeated = min(self.num_repeated_logprobs, len(output.prompt_logprobs))
        self.num_repeated_logprobs -= num_repeated
        fresh = output.prompt_logprobs[num_repeated:]
        self.num_prompt_logprobs += len(fresh)
        return msgspec.structs.replace(output, prompt_logprobs=fresh or None) if num_repeated else output

    def completion(self, max_model_len: int | None) -> StepOutput | None:
        """The last output of a request whose emitted tokens are all it may have; None if there is more to compute."""
        if not self.emitted:
            return None
        params, request_id = self.request.params, self.request.request_id
        if self.emitted[-1] in params.stop_token_ids and len(self.emitted) > params.min_tokens:
            return StepOutput(request_id=request_id, finish_reason="stop", stop_token_id=self.emitted[-1])
        if len(self.emitted) >= params.max_tokens or (max_model_len is not None and self.num_tokens >= max_model_len):
            return StepOutput(request_id=request_id, finish_reason="length")
        return None


class Journal:
    """All requests that have not ended, in order of arrival, and which of them the engine process may have now.

    After a crash the requests that were in the batch are suspects. They are replayed one at a time, each until it has
    made progress, and before anybody else: so a request that kills the engine is alone when it does so again, and the
    others of its first batch survive it.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._suspects: dict[str, Entry] = {}
        self.num_waiting = 0
        self.num_waiting_tokens = 0  # prompt and, in a replay, emitted tokens
        self.num_running = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def add(self, request: Request, *, now: float) -> Entry:
        """Raises ValueError if a request of that id has not ended."""
        if request.request_id in self._entries:
            raise ValueError(f"request id {request.request_id} is in use by a request that has not ended")
        entry = Entry(request=request, registered_at=now, emitted=list(request.output_token_ids))
        self._entries[request.request_id] = self._unsent[request.request_id] = entry
        self._count_waiting(entry, 1)
        return entry

    def remove(self, entry: Entry) -> None:
        request_id = entry.request.request_id
        del self._entries[request_id]
        self._unsent.pop(request_id, None)
        self._suspects.pop(request_id, None)
        if entry.is_running:
            self.num_running -= 1
        else:
            self._count_waiting(entry, -1)

    def start(self, entry: Entry) -> None:
        """The engine has run it for the first time since it was sent."""
        if entry.is_running:
            return
        self._count_waiting(entry, -1)
        self.num_running += 1
        entry.is_running = entry.has_run = True

    def clear(self, entry: Entry) -> None:
        """It made progress: what it died in has passed."""
        entry.num_crashes = 0
        self._suspects.pop(entry.request.request_id, None)

    def take_due(self) -> list[Entry]:
        """Which requests to send now; each is returned once per process."""
        if not self._suspects:
            due, self._unsent = self._unsent, {}
            return list(due.values())
        request_id = next(iter(self._suspects))
        suspect = self._unsent.pop(request_id, None)
        return [] if suspect is None else [suspect]

    def forget_process(self, blamed_ids: list[str]) -> list[Entry]:
        """The process is gone: all requests are unsent again. Returns those that are not to be tried again, removed."""
        for request_id in blamed_ids:
            if (entry := self._entries.get(request_id)) is not None:
                entry.num_crashes += 1
        quarantined = [entry for entry in self._entries.values() if entry.num_crashes >= MAX_CRASHES]
        for entry in quarantined:
            self.remove(entry)
        for entry in self._entries.values():
            if entry.is_running:
                self.num_running -= 1
                entry.is_running = False
                self._count_waiting(entry, 1)
            entry.add_number = 0
            entry.num_repeated_logprobs = entry.num_prompt_logprobs
        self._unsent = dict(self._entries)
        self._suspects = {name: entry for name, entry in self._entries.items() if entry.num_crashes}
        return quarantined

    def remove_all(self) -> list[Entry]:
        entries = list(self._entries.values())
        for entry in entries:
            self.remove(entry)
        return entries

    def _count_waiting(self, entry: Entry, sign: int) -> None:
        # a waiting request emits nothing, so that the same number is taken off that was put on
        self.num_waiting += sign
        self.num_waiting_tokens += sign * entry.num_tokens
