"""The dispatcher: sends requests and aborts to the engine process, and routes its outputs to their readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.client.deaths import Verdict
from engine.client.journal import MAX_SOLO_DEATHS, EngineError, Entry, Journal
from engine.client.outbox import Outbox
from engine.client.supervisor import EngineObserver
from engine.ipc.messages import Abort, Add, ModelInfo, Step, ToEngine
from engine.types import Request, StepOutput


class Dispatcher:
    """Routes requests and outputs; the supervisor tells it of the process. All of it runs in the event loop."""

    def __init__(self, observer: EngineObserver) -> None:
        self.journal = Journal()
        self._observer = observer
        self._send: Callable[[ToEngine], int] | None = None  # None while no process is ready
        self._max_model_len: int | None = None
        self._num_replays = 0
        self._aborted_ids: list[str] = []
        self._gone: tuple[str, str] | None = None  # kind and message, once no process will follow

    @property
    def has_work(self) -> bool:
        return self.journal.num_sent > 0

    def register(self, request: Request, outbox: Outbox) -> Entry:
        """Adds a request. Raises ValueError if its id is in use, EngineError if the engine will not come back."""
        if self._gone is not None:
            raise _error(*self._gone)
        entry = self.journal.add(request, outbox=outbox, now=time.monotonic())
        self._send_due()
        return entry

    def leave(self, entry: Entry) -> None:
        """Ends the request of a consumer that has left: aborts it, unless it has ended."""
        if entry.is_over:
            return
        entry.is_over = True
        self.journal.leave(entry)
        if entry.add_number:
            if not self._aborted_ids:  # aborts of one iteration of the loop go in one frame
                asyncio.get_running_loop().call_soon(self._send_aborts)
            self._aborted_ids.append(entry.request.request_id)
        self._send_due()  # if it was a suspect, the next one's turn comes

    def engine_ready(self, send: Callable[[ToEngine], int], model: ModelInfo) -> None:
        self._send = send
        self._max_model_len = model.max_model_len
        if self._num_replays:
            self._observer.on_replay(self._num_replays)
            self._num_replays = 0
        self._send_due()

    def engine_stepped(self, step: Step) -> None:
        now = time.monotonic()
        for request_id in step.started:
            entry = self._addressee(request_id, step)
            if entry is not None:
                is_first = not entry.has_run
                self.journal.start(entry)
                if is_first:
                    self._observer.on_started(request_id, now - entry.registered_at)
        for output in step.outputs:
            entry = self._addressee(output.request_id, step)
            if entry is not None:
                self._deliver(entry, output)

    def engine_died(self, batch_ids: list[str]) -> Verdict:
        self._send = None
        self._aborted_ids.clear()
        quarantined, verdict = self.journal.forget_process(batch_ids)
        for entry in quarantined:
            reason = f"the engine died {MAX_SOLO_DEATHS} times while it computed nothing but this request"
            self._end(entry, "quarantined", f"request {entry.request.request_id} is not tried again: {reason}")
        self._num_replays = len(self.journal)
        return verdict

    def engine_gone(self, kind: str, message: str) -> None:
        self._send = None
        self._gone = (kind, message)
        for entry in self.journal.remove_all():
            self._end(entry, kind, message)

    def _addressee(self, request_id: str, step: Step) -> Entry | None:
        """The entry of an output; None if its request was aborted, even if a later one has the same id."""
        entry = self.journal.get(request_id)
        return entry if entry is not None and 0 < entry.add_number <= step.num_received else None

    def _deliver(self, entry: Entry, output: StepOutput) -> None:
        if output.finish_reason == "error":
            self.journal.remove(entry)
            self._end(entry, output.error_kind, output.error or f"request {output.request_id} failed in the engine")
            self._send_due()
            return
        self.journal.start(entry)
        news = entry.accept(output)
        if news is None:
            return
        if news.finish_reason is not None:
            self._finish(entry, news)
            self._send_due()
            return
        entry.outbox.put(news)
        if self.journal.passes_trial(entry):
            if self.journal.has_suspects:  # which must have the process to themselves
                self.journal.withdraw(entry)
                self._aborted_ids.append(entry.request.request_id)
            self._send_due()

    def _finish(self, entry: Entry, output: StepOutput) -> None:
        self.journal.remove(entry)
        entry.is_over = True
        entry.outbox.put(output)

    def _end(self, entry: Entry, kind: str, message: str) -> None:
        entry.is_over = True
        entry.outbox.fail(_error(kind, message))

    def _send_due(self) -> None:
        if self._send is None:
            return
        self._send_aborts()  # first, since a new request may have the id of an aborted one
        while due := self.journal.take_due():
            for entry in due:
                completion = entry.completion(self._max_model_len)
                if completion is not None:
                    self._finish(entry, completion)
                else:
                    entry.add_number = self._send(Add(entry.resumed()))

    def _send_aborts(self) -> None:
        if self._aborted_ids and self._send is not None:
            self._send(Abort(self._aborted_ids))
            self._aborted_ids = []


def _error(kind: str, message: str) -> EngineError:
    return EngineError(message, kind=kind)
