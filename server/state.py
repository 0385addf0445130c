"""What the routes share; it lies at `app.state.server`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.config import Config

if TYPE_CHECKING:
    from engine.client import EngineClient
    from server.admission import Admission
    from server.metrics import Metrics
    from server.tokenizer import Tokenizer


@dataclass(slots=True)
class ServerState:
    """One running server.

    A request's own values lie in `request.state`: `request_id` (the caller's X-Request-Id where it is usable, else
    a new one) and `tenant` (a salt that differs by API key, "" without keys).
    """

    config: Config
    engine: EngineClient
    admission: Admission
    metrics: Metrics
    tokenizer: Tokenizer | None  # None until the model is there
    model_names: list[str]  # the first is the one that answers carry
    started_at: float  # seconds, time.monotonic
    draining: bool = False  # no new requests; the running ones end
    setting_sources: dict[str, str] = field(default_factory=dict)  # "server.port": "--port"; defaults are absent
    was_ready: bool = False  # the model has been there once
    state_since: float = 0.0  # seconds, time.monotonic: when the engine last became ready, or last stopped being so

    @property
    def is_ready(self) -> bool:
        """Requests that come now are taken and run."""
        return self.engine.state == "ready" and self.tokenizer is not None and not self.draining

    def drain(self) -> None:
        """Closes admission and turns readiness off, for good."""
        self.draining = True
        self.admission.close()
