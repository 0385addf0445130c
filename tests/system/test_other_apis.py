"""Responses, Messages and embeddings over real HTTP, on a real model: beside each other, and when the engine dies."""

from __future__ import annotations

import asyncio
import base64

import httpx
import numpy as np
import pytest

from tests.support.event_grammar import read_message, read_response

TEXTS = [f"text {number} " + "of many words " * (number % 7) for number in range(24)]
CHAT = {"model": "tiny", "seed": 5, "temperature": 0.8, "ignore_eos": True}
RESPONSE = CHAT | {"input": "hello", "max_output_tokens": 200, "stream": True}
MESSAGE = CHAT | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "stream": True}


async def embed(client: httpx.AsyncClient, texts: list[str], **fields) -> np.ndarray:
    body = {"model": "tiny", "input": texts, "encoding_format": "base64"} | fields
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    encoded = [one["embedding"] for one in response.json()["data"]]
    return np.stack([np.frombuffer(base64.b64decode(text), dtype="<f4") for text in encoded])


async def respond(client: httpx.AsyncClient) -> str:
    response = await client.post("/v1/responses", json=RESPONSE)
    answer, _ = read_response(response.text)
    assert (answer["status"], answer["usage"]["output_tokens"]) == ("incomplete", 200)
    return answer["output"][0]["content"][0]["text"]


async def send_message(client: httpx.AsyncClient) -> str:
    response = await client.post("/v1/messages", json=MESSAGE)
    answer, _ = read_message(response.text)
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", 200)
    return answer["content"][0]["text"]


async def everything(url: str) -> tuple[str, str, np.ndarray, np.ndarray]:
    async with httpx.AsyncClient(base_url=url, timeout=100) as client:
        return await asyncio.gather(
            respond(client), send_message(client), embed(client, TEXTS, pooling="mean"), embed(client, TEXTS)
        )


async def test_what_runs_beside_each_other_is_what_runs_alone(server) -> None:
    text, message, means, lasts = await everything(server.url)
    assert text == message, "one chat in two APIs"
    async with httpx.AsyncClient(base_url=server.url, timeout=100) as client:
        assert await respond(client) == text
        for number in (0, 6, 23):
            for vectors, pooling in ((means, "mean"), (lasts, "last")):
                [alone] = await embed(client, [TEXTS[number]], pooling=pooling)
                np.testing.assert_allclose(alone, vectors[number], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)
    assert np.abs(means - lasts).max() > 0.01
    assert server.metric("peregrine_kv_blocks", state="owned") == 0


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/api/chat"])
async def test_streams_that_nobody_reads_free_what_they_have(server, path) -> None:
    body = MESSAGE | {"max_tokens": 400} if "messages" in path else RESPONSE | {"max_output_tokens": 400}
    if path == "/api/chat":
        body = {"model": "tiny", "messages": MESSAGE["messages"], "options": {"num_predict": 400, "ignore_eos": True}}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for _ in range(4):
            async with client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                async for _ in response.aiter_bytes():
                    break
    await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_kv_blocks", state="owned") == 0, 20)


async def test_answers_and_vectors_survive_the_death_of_the_engine(start_server) -> None:
    with start_server() as server:
        expected = await everything(server.url)
        running = asyncio.create_task(everything(server.url))
        while await asyncio.to_thread(server.metric, "peregrine_requests_running") < 2:
            assert not running.done()
            await asyncio.sleep(0.01)
        server.engine_process.kill()
        text, message, means, lasts = await running
        assert [text, message] == list(expected[:2])
        np.testing.assert_allclose(means, expected[2], atol=1e-4)
        np.testing.assert_allclose(lasts, expected[3], atol=1e-4)
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_engine_restarts_total") == 1, 30)
