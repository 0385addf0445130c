"""Traces of requests: the caller's trace id in the log and the answer, and a span per request for a collector.

W3C Trace Context (https://www.w3.org/TR/trace-context/), sections 3.2 and 4. A span needs the packages of the extra
`tracing`, which are imported where `tracing.endpoint` is set and nowhere else.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LAST_SPANS = 3.0  # seconds that spans get to be sent when the server ends
Value = str | int | float


class TracingError(ValueError):
    """Tracing was asked for and cannot be had."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A request's place in a trace: hexadecimal ids of 16 and 8 bytes."""

    trace_id: str
    span_id: str  # the caller's span; or this request's own, where it says so to others
    is_sampled: bool

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


def parse_traceparent(values: list[bytes]) -> TraceContext | None:
    """The context in the traceparent headers of a request. None where there is not exactly one that is valid."""
    if len(values) != 1:
        return None
    match = TRACEPARENT.fullmatch(values[0].decode("latin-1").strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    is_invalid = version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16)
    return None if is_invalid else TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


class RequestSpan(Protocol):
    """The interface of one request's part in its trace."""

    @property
    def context(self) -> TraceContext | None:
        """What the log and the answer say; None where the request has no trace."""
        ...

    def end(self, status: int | None, attributes: Mapping[str, Value], *, first_byte_after: float | None) -> None:
        """Called once. first_byte_after: seconds from the start to the first byte of the answer."""
        ...


class Tracing(Protocol):
    """The interface of tracing to the middleware that sees all requests."""

    def start(self, parent: TraceContext | None, *, name: str) -> RequestSpan: ...

    def close(self) -> None:
        """Sends what there is left, for at most LAST_SPANS."""
        ...


class PassedOn:
    """A request whose trace is passed on: with a span id of its own, of which nobody is told."""

    def __init__(self, parent: TraceContext | None) -> None:
        self.context = parent and TraceContext(parent.trace_id, secrets.token_hex(8), parent.is_sampled)

    def end(self, status: int | None, attributes: Mapping[str, Value], *, first_byte_after: float | None) -> None:
        """Nobody counts."""


class PassOn:
    """Tracing without a collector."""

    def start(self, parent: TraceContext | None, *, name: str) -> RequestSpan:
        return PassedOn(parent)

    def close(self) -> None:
        """There is nothing to send."""


class Recorded:
    """A request with a span of OpenTelemetry's."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._started_at = time.time_ns()
        own = span.get_span_context()
        self.context = TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", own.trace_flags.sampled)

    def end(self, status: int | None, attributes: Mapping[str, Value], *, first_byte_after: float | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        for name, value in attributes.items():
            self._span.set_attribute(name, value)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if status is None or status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        if first_byte_after is not None:
            self._span.add_event("first byte", timestamp=self._started_at + int(first_byte_after * 1e9))
        self._span.end()


class Collector:
    """Tracing with a collector: a span per request, sent by a thread of OpenTelemetry's in batches.

    A caller's decision to sample or not is followed; of requests without one, `ratio` are sampled.
    """

    def __init__(self, endpoint: str, *, service: str, ratio: float) -> None:
        """service: its name in the collector. Raises TracingError where the packages of the extra are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise TracingError(f"tracing.endpoint needs {error.name}; pip install 'peregrine[tracing]'") from error
        resource = Resource.create({"service.name": service, "service.version": VERSION})
        self._provider: TracerProvider = TracerProvider(
            resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("peregrine", VERSION)

    def start(self, parent: TraceContext | None, *, name: str) -> RequestSpan:
        from opentelemetry import trace

        context = None
        if parent is not None:
            remote = trace.SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(int(parent.is_sampled)),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        return Recorded(self._tracer.start_span(name, context=context, kind=trace.SpanKind.SERVER))

    def close(self) -> None:
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)  # a dead collector may keep it for long
        sending.start()
        sending.join(LAST_SPANS)
