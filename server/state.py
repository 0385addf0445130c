"""The state of a running server, which the routes share, at `app.state.server`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.ipc.messages import Failed
from server.config import Config
from server.generation.active_requests import ActiveRequests
from server.generation.answer_store import AnswerStore
from server.http.auth import ApiKeys
from server.telemetry.flight_recorder import FlightRecorder
from server.telemetry.request_timeline import RequestHistory

if TYPE_CHECKING:
    from engine.client.client import EngineClient
    from server.generation.admission import Admission
    from server.http.body_reader import BodyBudget
    from server.http.key_file import KeyFile
    from server.offline.batch_service import BatchService
    from server.parsing.template_traits import TemplateTraits
    from server.structured.grammar_checker import GrammarChecker
    from server.telemetry.metrics import Metrics
    from server.text.chat_renderer import ChatRenderer
    from server.text.tokenizer import Tokenizer


@dataclass(slots=True)
class ServerState:
    """One running server.

    A request's own values lie in `request.state`: `request_id` (the caller's X-Request-Id where it is usable, else
    a new one), `tenant` (a salt that differs by API key, "" without keys) and `is_operator`.
    """

    config: Config
    engine: EngineClient
    admission: Admission
    metrics: Metrics
    tokenizer: Tokenizer | None  # None until the model is there
    model_names: list[str]  # the first is the one that answers carry
    started_at: float  # seconds, time.monotonic
    body_budget: BodyBudget
    chat_renderer: ChatRenderer
    grammar_checker: GrammarChecker
    template_traits: dict[str, TemplateTraits] = field(default_factory=dict)  # by template, once they were found out
    keys: ApiKeys = field(default_factory=lambda: ApiKeys([]))
    key_file: KeyFile | None = None  # keeps `keys` as it says
    batches: BatchService | None = None  # None: there is no folder for them
    history: RequestHistory = field(default_factory=RequestHistory)
    recorder: FlightRecorder = field(default_factory=FlightRecorder)
    active_requests: ActiveRequests = field(default_factory=ActiveRequests)
    answers: AnswerStore = field(default_factory=lambda: AnswerStore(max_answers=0, max_bytes=1))
    draining: bool = False  # it will end, and new requests belong elsewhere; until `refuse_requests` they are served
    setting_sources: dict[str, str] = field(default_factory=dict)  # "server.port": "--port"; defaults are absent
    state_since: float = field(default_factory=time.monotonic)  # seconds: when it last became, or ceased to be, ready
    first_ready: asyncio.Event = field(default_factory=asyncio.Event)
    failed: asyncio.Event = field(default_factory=asyncio.Event)  # it will never be ready again
    failure: Failed | None = None

    @property
    def status(self) -> str:
        """One word: starting, ready, restarting, draining, failed or stopped."""
        if self.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        if self.engine.state == "ready" and self.tokenizer is None:
            return "starting"
        return str(self.engine.state)

    @property
    def is_ready(self) -> bool:
        """Whether new requests should be sent here, and run."""
        return self.status == "ready"

    @property
    def is_ending(self) -> bool:
        """Whether what is refused now will not be taken later."""
        return self.draining or self.failure is not None or self.engine.state in ("failed", "stopped")

    @property
    def num_seats(self) -> int:
        """Sequences that the engine runs at once; 1 while that is not known."""
        setting = self.engine.model.settings.get("scheduler.max_num_seqs") if self.engine.model is not None else None
        return setting.value if setting is not None and isinstance(setting.value, int) else 1

    def become_ready(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.state_since = time.monotonic()
        self.first_ready.set()

    def end_readiness(self) -> None:
        """Makes /readyz say 503, for good. Requests are still taken."""
        if not self.draining:
            self.draining = True
            self.state_since = time.monotonic()

    def refuse_requests(self) -> None:
        """Ends readiness and admission for good, and abandons bodies that are half read."""
        self.end_readiness()
        self.body_budget.close()
        self.admission.close()

    def fail(self, failure: Failed) -> None:
        """Marks the server as failed, for good; the first reason is kept."""
        if self.failure is None:
            self.failure = failure
            self.state_since = time.monotonic()
            self.failed.set()
