"""Traces: the caller's is passed on, and a collector gets one span per request."""

import json
import logging
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from server.telemetry.tracing import Collector, TraceContext, TracingError, parse_traceparent
from tests.support.server_world import wait_until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{SPAN}-01"
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("value", "is_sampled"),
    [(HEADER, True), (HEADER[:-1] + "0", False), (f"cc-{TRACE}-{SPAN}-03-what-will-be", True), (f" {HEADER} ", True)],
)
def test_a_valid_header_is_a_place_in_a_trace(value: str, is_sampled: bool) -> None:
    assert parse_traceparent([value.encode()]) == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [HEADER, HEADER],
        ["", "x"],
        [""],
        ["00"],
        [HEADER.upper()],
        [HEADER + "-more"],
        ["ff" + HEADER[2:]],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [HEADER.replace("a", "é")],
        [HEADER + "\n"],
    ],
)
def test_others_are_none(values: list[str]) -> None:
    found = parse_traceparent([value.encode("latin-1") for value in values])
    assert found is None or values == [HEADER + "\n"]  # space around a header's value is no part of it


def access_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "peregrine.access"]


def test_a_trace_is_in_the_log_and_the_answer(operate, caplog) -> None:
    caplog.set_level(logging.INFO, logger="peregrine.access")
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        answer = client.get("/v1/models", headers={"traceparent": HEADER})
        back = parse_traceparent([answer.headers["traceparent"].encode()])
        assert back is not None
        assert (back.trace_id, back.is_sampled) == (TRACE, True)
        assert back.span_id != SPAN
        wait_until(lambda: bool(access_lines(caplog)))
        assert f" trace={TRACE}" in access_lines(caplog)[0]
        assert "traceparent" not in client.get("/v1/models").headers
        assert "traceparent" not in client.get("/v1/models", headers={"traceparent": "junk"}).headers


class Sink(BaseHTTPRequestHandler):
    """A collector that keeps the spans which it is sent (OTLP over HTTP, protocol buffers)."""

    spans: list  # of the class that a test makes

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            content = zlib.decompress(content, 31)
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list]]:
    """(endpoint, the spans that it has received)"""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `tracing` is not installed")
    kind = type("OwnSink", (Sink,), {"spans": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind.spans
    server.shutdown()
    thread.join()
    server.server_close()


def attributes(span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_collector_gets_one_span_for_each_request_however_many_chunks_it_has(operate, collector) -> None:
    endpoint, spans = collector
    with operate({"tracing": {"endpoint": endpoint}}) as operation, httpx.Client(base_url=operation.url) as client:
        operation.engine.say("a text of many tokens")
        body = BODY | {"stream": True, "max_tokens": 8}
        answer = client.post("/v1/completions", json=body, headers={"traceparent": HEADER, "X-Request-Id": "mine"})
        assert answer.text.count("data: ") > 3
        client.post("/v1/completions", json=BODY | {"model": "other"})
        client.get("/readyz")
    wait_until(lambda: len(spans) == 2)  # the rest is sent when the server ends
    streamed, refused = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert (streamed.name, streamed.trace_id.hex(), streamed.parent_span_id.hex()) == (
        "POST /v1/completions",
        TRACE,
        SPAN,
    )
    assert streamed.span_id.hex() in answer.headers["traceparent"]
    found = attributes(streamed)
    assert (found["http.response.status_code"], found["request.id"], found["outcome"]) == (200, "mine", "length")
    assert found["output_tokens"] == 8
    [first_byte] = streamed.events
    assert streamed.start_time_unix_nano < first_byte.time_unix_nano <= streamed.end_time_unix_nano
    assert attributes(refused)["http.response.status_code"] == 404
    assert "text" not in json.dumps([attributes(span) for span in spans], default=str)


def test_who_calls_decides_what_is_sampled(operate, collector) -> None:
    endpoint, spans = collector
    config = {"tracing": {"endpoint": endpoint, "ratio": 0}}
    with operate(config) as operation, httpx.Client(base_url=operation.url) as client:
        client.get("/v1/models")
        client.get("/v1/models", headers={"traceparent": HEADER[:-1] + "0"})
        answer = client.get("/v1/models", headers={"traceparent": HEADER})
        assert answer.headers["traceparent"].endswith("-01")
    wait_until(lambda: len(spans) == 1)
    assert spans[0].trace_id.hex() == TRACE


def test_a_collector_that_is_not_there_holds_nothing_up(operate) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `tracing` is not installed")
    config = {"tracing": {"endpoint": "http://127.0.0.1:9"}}
    with operate(config) as operation:
        assert httpx.get(operation.url + "/v1/models").status_code == 200


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'peregrine\[tracing\]'"):
        Collector("http://127.0.0.1:9", service="peregrine", ratio=1.0)
