"""The journal: what the server remembers of each request, so that a new engine process can continue it after a crash.

All of it runs in the server's event loop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from engine.client.deaths import Verdict
from engine.client.outbox import Outbox
from engine.types import Request, StepOutput

MAX_SOLO_DEATHS = 2  # deaths alone in the step, after which a suspect is quarantined
TRIAL_TOKENS = 4  # new tokens that clear a suspect: with steps in flight, the engine dies a step or two late
MAX_REMEMBERED_LEAVERS = 4096


class EngineError(RuntimeError):
    """The request cannot be finished. The message is for the client.

    kind: "request" (this one failed in the engine), "constraints" (what it allows leaves no token to go on with),
    "quarantined" (the engine died of it, it seems), "engine_failed" (the engine will not come back) or "stopped" (the
    server ends).
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(eq=False, slots=True)
class Entry:
    """The journal's entry of one request, from its registration to its end."""

    request: Request
    registered_at: float  # seconds, time.monotonic
    emitted: list[int]
    outbox: Outbox  # shared with the other requests of its reader
    add_number: int = 0  # number of its Add frame to the current process; 0: not sent
    is_running: bool = False  # the current process has started it
    has_run: bool = False  # some process has started it
    is_over: bool = False  # its last output or its error is in the outbox
    num_tokens_here: int = 0  # output tokens of the current process
    num_solo_deaths: int = 0  # deaths as a suspect, alone in the step
    num_prompt_logprobs: int = 0  # delivered
    num_repeated_logprobs: int = 0  # prompt log-probabilities of a replay that were delivered before its crash

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.emitted)

    def resumed(self) -> Request:
        """The request to be replayed: with the output tokens so far."""
        return msgspec.structs.replace(self.request, output_token_ids=list(self.emitted))

    def accept(self, output: StepOutput) -> StepOutput | None:
        """Records an output, and returns what of it the client has not had; None if there is nothing."""
        if output.prompt_logprobs is not None:
            output = self._without_repeats(output)
        self.emitted += output.token_ids
        self.num_tokens_here += len(output.token_ids)
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
        """The last output of a request that was complete at the crash; None if there is more to compute."""
        if not self.emitted:
            return None
        params, request_id = self.request.params, self.request.request_id
        if self.emitted[-1] in params.stop_token_ids and len(self.emitted) > params.min_tokens:
            return StepOutput(request_id=request_id, finish_reason="stop", stop_token_id=self.emitted[-1])
        if len(self.emitted) >= params.max_tokens or (max_model_len is not None and self.num_tokens >= max_model_len):
            return StepOutput(request_id=request_id, finish_reason="length")
        return None


class Journal:
    """All requests that have not ended, in order of arrival, and which of them are to be sent to the engine process.

    When the process dies, the requests of its batch become suspects, of which one may have killed it. They are tried
    one at a time: each has the new process to itself until it has some new tokens, and then waits until all were tried.
    So a request that kills the engine is alone when it does so again, and the others of its batch survive. Those whose
    answer has begun are tried first, those that were alone at a death last, so that most innocent requests go on early.
    A suspect is quarantined at its second death alone, because the first may have been a kill from outside.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._suspects: dict[str, Entry] = {}
        self._leavers: deque[str] = deque(maxlen=MAX_REMEMBERED_LEAVERS)  # aborted, sent and still without a token
        self._lost_suspects: set[str] = set()  # suspects that were aborted before they could be tried alone
        self.num_waiting = 0
        self.num_waiting_tokens = 0  # prompt and, in a replay, emitted tokens
        self.num_background_waiting = 0  # of `num_waiting`, those that nobody waits for
        self.num_background_waiting_tokens = 0
        self.num_running = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_sent(self) -> int:
        """Requests that the current process has."""
        return len(self._entries) - len(self._unsent)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def add(self, request: Request, *, outbox: Outbox, now: float) -> Entry:
        """Raises ValueError if a request of that id has not ended."""
        if request.request_id in self._entries:
            raise ValueError(f"request id {request.request_id} is in use by a request that has not ended")
        entry = Entry(request=request, registered_at=now, emitted=list(request.output_token_ids), outbox=outbox)
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

    def leave(self, entry: Entry) -> None:
        """Removes a request that its client has aborted."""
        if entry.request.request_id in self._suspects:
            self._lost_suspects.add(entry.request.request_id)
        elif entry.add_number and not entry.num_tokens_here:
            self._leavers.append(entry.request.request_id)
        self.remove(entry)

    def start(self, entry: Entry) -> None:
        """Counts the request as running: the current process has started it."""
        if entry.is_running:
            return
        self._count_waiting(entry, -1)
        self.num_running += 1
        entry.is_running = entry.has_run = True

    def passes_trial(self, entry: Entry) -> bool:
        """Clears a suspect that has enough new tokens. Whether it did."""
        if entry.num_tokens_here < TRIAL_TOKENS or self._suspects.pop(entry.request.request_id, None) is None:
            return False
        entry.num_solo_deaths = 0
        return True

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def withdraw(self, entry: Entry) -> None:
        """Marks the request as not sent, to be sent again after the trials. The caller aborts it in the process."""
        self._unsend(entry)
        self._unsent[entry.request.request_id] = entry

    def take_due(self) -> list[Entry]:
        """The requests to send now: one suspect, or where there is none all, in order of arrival."""
        if not self._suspects:
            due, self._unsent = self._unsent, {}
            return sorted(due.values(), key=lambda entry: entry.registered_at)
        request_id = next(iter(self._suspects))
        suspect = self._unsent.pop(request_id, None)
        return [] if suspect is None else [suspect]

    def forget_process(self, batch_ids: list[str]) -> tuple[list[Entry], Verdict]:
        """Marks all requests as not sent, after the process has died in a step of the requests `batch_ids`.

        Returns the quarantined requests, which it removes, and the verdict on the death.
        """
        culprit_ids: set[str] = set()
        if not self._suspects:  # all other suspects were cleared, so it was one of those that were aborted
            culprit_ids, self._lost_suspects = self._lost_suspects, set()
        on_trial = next((entry for entry in self._suspects.values() if entry.add_number), None)
        quarantined: list[Entry] = []
        if on_trial is not None and batch_ids == [on_trial.request.request_id]:
            on_trial.num_solo_deaths += 1
            if on_trial.num_solo_deaths >= MAX_SOLO_DEATHS:
                quarantined.append(on_trial)
                culprit_ids.add(on_trial.request.request_id)
                self.remove(on_trial)
        self._lost_suspects |= set(batch_ids) & set(self._leavers)
        self._leavers.clear()
        suspects = {**self._suspects, **{name: self._entries[name] for name in batch_ids if name in self._entries}}
        self._suspects = dict(sorted(suspects.items(), key=lambda item: _order_of_trial(item[1])))
        for entry in self._entries.values():
            self._unsend(entry)
        self._unsent = dict(self._entries)
        return quarantined, Verdict(has_suspect=on_trial is not None, culprit_ids=frozenset(culprit_ids))

    def _unsend(self, entry: Entry) -> None:
        if entry.is_running:
            self.num_running -= 1
            entry.is_running = False
            self._count_waiting(entry, 1)
        entry.add_number = 0
        entry.num_tokens_here = 0
        entry.num_repeated_logprobs = entry.num_prompt_logprobs

    def remove_all(self) -> list[Entry]:
        entries = list(self._entries.values())
        for entry in entries:
            self.remove(entry)
        return entries

    def _count_waiting(self, entry: Entry, sign: int) -> None:
        # num_tokens is the same at both calls, since a waiting request gets no tokens
        self.num_waiting += sign
        self.num_waiting_tokens += sign * entry.num_tokens
        if entry.request.is_background:
            self.num_background_waiting += sign
            self.num_background_waiting_tokens += sign * entry.num_tokens


def _order_of_trial(suspect: Entry) -> tuple[int, bool]:
    return suspect.num_solo_deaths, not suspect.emitted
