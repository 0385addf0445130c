"""Batches of a real server: kills of the engine and of the server itself, and requests of others meanwhile."""

from __future__ import annotations

import io
import json
from pathlib import Path

import openai

from tests.support.server_process import Server

URL = "/v1/completions"
NUM_LINES = 60


def line(number: int) -> dict[str, object]:
    body = {"model": "tiny", "prompt": f"line {number} of many", "max_tokens": 150, "ignore_eos": True, "seed": number}
    return {"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": {**body, "temperature": 0.8}}


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def begin(client: openai.OpenAI, count: int = NUM_LINES) -> str:
    data = "".join(json.dumps(line(number)) + "\n" for number in range(count)).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id


def wait_for(server: Server, client: openai.OpenAI, batch_id: str, count: int) -> None:
    server.wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed >= count, 60)


def finish(server: Server, client: openai.OpenAI, batch_id: str) -> dict[str, str]:
    """The texts by custom_id."""
    server.wait_for(lambda: client.batches.retrieve(batch_id).status == "completed", 90)
    batch = client.batches.retrieve(batch_id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (batch.request_counts.total, 0)
    lines = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
    assert len(lines) == batch.request_counts.total
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in lines}


def test_a_batch_survives_the_engine_and_the_server(start_server, tmp_path: Path) -> None:
    options = ("--batch-folder", str(tmp_path / "batches"), "--max-num-seqs", "4")
    with start_server(*options) as server, connect(server) as client:
        expected = finish(server, client, begin(client))
        batch_id = begin(client)
        wait_for(server, client, batch_id, 5)
        server.engine_process.kill()
        wait_for(server, client, batch_id, 20)
        assert server.metric("peregrine_engine_restarts_total") == 1
        server.process.kill()
        server.process.wait()
    with start_server(*options) as server, connect(server) as client:
        assert client.batches.retrieve(batch_id).status in ("in_progress", "finalizing", "completed")
        assert finish(server, client, batch_id) == expected
        assert server.metric("peregrine_batch_lines_total", outcome="completed") <= NUM_LINES - 20
        begun = begin(client)
        wait_for(server, client, begun, 1)
        assert server.stop() == 0, "a batch delays no end of a server"
    with start_server(*options) as server, connect(server) as client:
        assert finish(server, client, begun) == expected


def test_others_come_first_and_wait_for_no_batch(start_server, tmp_path: Path) -> None:
    options = (
        "--batch-folder",
        str(tmp_path / "batches"),
        "--max-num-seqs",
        "4",
        "--set",
        "limits.max_queued_requests=2",
    )
    with start_server(*options) as server, connect(server) as client:
        batch_id = begin(client, 2000)
        wait_for(server, client, batch_id, 4)
        for number in range(5):
            answer = client.completions.create(model="tiny", prompt=f"somebody waits {number}", max_tokens=20, seed=1)
            assert answer.usage.completion_tokens > 0
        assert client.batches.retrieve(batch_id).status == "in_progress"
        assert client.batches.cancel(batch_id).status in ("cancelling", "cancelled")
        server.wait_for(lambda: client.batches.retrieve(batch_id).status == "cancelled", 30)
        server.wait_for(lambda: server.metric("peregrine_requests_running") == 0, 10)
