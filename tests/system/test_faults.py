"""What happens to requests and processes when something dies, hangs or leaves."""

import asyncio
import json
import os
import random
import signal
import time

import httpx
import psutil
import pytest

NUM_TOKENS = 460  # so that an answer takes longer than finding out that it has begun


def _body(index: int, *, stream: bool) -> dict[str, object]:
    return {
        "model": "tiny",
        "prompt": f"request {index} of many",
        "max_tokens": NUM_TOKENS,
        "temperature": 0.8,
        "seed": index,
        "ignore_eos": True,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }


async def _plain(client: httpx.AsyncClient, index: int) -> str:
    response = await client.post("/v1/completions", json=_body(index, stream=False))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == NUM_TOKENS
    return str(response.json()["choices"][0]["text"])


async def _streamed(client: httpx.AsyncClient, index: int) -> str:
    text, finish_reasons, is_done = "", [], False
    async with client.stream("POST", "/v1/completions", json=_body(index, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    text += choice["text"]
                    finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            is_done |= line == "data: [DONE]"
    assert finish_reasons == ["length"]
    assert is_done
    return text


async def _all(url: str, count: int = 16) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
        streamed = [_streamed(client, i) for i in range(count)]
        return await asyncio.gather(*streamed, *(_plain(client, i) for i in range(count)))


async def test_requests_survive_the_death_of_the_engine(start_server):
    started_at = time.monotonic()
    with start_server() as server:
        start_seconds = time.monotonic() - started_at
        expected = await _all(server.url)
        started_at, first = time.monotonic(), server.engine_process
        running = asyncio.create_task(_all(server.url))
        while await asyncio.to_thread(server.metric, "peregrine_requests_running") < 4:
            await asyncio.sleep(0.01)
            assert time.monotonic() - started_at < 30
        first.kill()
        killed_at = time.monotonic()
        await asyncio.to_thread(server.wait_for, lambda: server.client.get("/readyz").status_code == 503, 5)
        await asyncio.to_thread(server.wait_until_ready)
        assert time.monotonic() - killed_at < start_seconds + 2
        assert await running == expected
        assert server.engine_process.pid != first.pid
        assert server.metric("peregrine_engine_restarts_total") == 1
        assert server.metric("peregrine_replayed_requests_total") > 0
        assert server.metric("peregrine_requests_total", outcome="length") == 64
        assert server.metric("peregrine_generation_tokens_total") == 64 * NUM_TOKENS


async def test_kills_one_after_the_other_end_no_request(start_server):
    """The second comes just as the replacement is ready, the third while it tries the suspects one by one."""
    with start_server("--set", "supervision.max_deaths=4") as server:
        expected = await _all(server.url, count=8)
        running = asyncio.create_task(_all(server.url, count=8))
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_requests_running") >= 4, 20)
        for delay in (0.0, 0.0, 0.02):
            await asyncio.to_thread(server.wait_until_ready)
            await asyncio.sleep(delay)
            server.engine_process.kill()
            await asyncio.to_thread(server.wait_for, lambda: server.client.get("/readyz").status_code == 503, 5)
        assert await running == expected
        # where the answers were complete before the last kill, nobody has waited for the process that follows
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_engine_restarts_total") == 3, 20)
        assert server.metric("peregrine_requests_total", outcome="length") == 32


def test_a_killed_server_leaves_no_process_behind(start_server):
    with start_server() as server:
        family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        assert len(family) >= 2
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=5)
        assert alive == []


async def test_sigterm_lets_streams_finish(start_server):
    with start_server() as server:
        running = asyncio.create_task(_all(server.url, count=8))
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_requests_running") > 0, 20)
        engine = server.engine_process
        server.process.send_signal(signal.SIGTERM)
        texts = await running
        assert texts[:8] == texts[8:]
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not engine.is_running()


async def test_sigterm_ends_what_outlasts_the_grace(start_server):
    with start_server("--shutdown-timeout", "1") as server:
        body = _body(0, stream=True) | {"max_tokens": 480}
        events: list[str] = []
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if not events:
                    os.kill(server.engine_process.pid, signal.SIGSTOP)  # it will not finish by itself
                    server.process.send_signal(signal.SIGTERM)
                events += [line] if line.startswith("data: ") else []
        assert events[-1] == "data: [DONE]"
        assert "error" in json.loads(events[-2].removeprefix("data: "))
        assert await asyncio.to_thread(server.process.wait, 20) == 0


async def test_a_frozen_engine_is_noticed_and_replaced(start_server):
    with start_server() as server:
        expected = await _all(server.url, count=4)
        running = asyncio.create_task(_all(server.url, count=4))
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_requests_running") > 0, 20)
        frozen = server.engine_process
        frozen.suspend()
        await asyncio.to_thread(server.wait_for, lambda: server.client.get("/health").status_code == 503, 10)
        await asyncio.to_thread(server.wait_until_ready)
        assert await running == expected
        assert not frozen.is_running()


@pytest.mark.slow  # compiles twice
def test_damaged_compiled_kernels_are_made_again(start_server, tmp_path):
    kernels = tmp_path / "cache" / "peregrine" / "kernels"
    with start_server("--set", "device.kernels=numba") as server:
        expected = server.complete("hello", max_tokens=8, temperature=0)["choices"]
    files = list(kernels.glob("*/*.kernel"))
    assert len(files) >= 5
    for number, file in enumerate(files):
        content = file.read_bytes()
        file.write_bytes([content[: len(content) // 2], b"", bytes(len(content))][number % 3])
    with start_server("--set", "device.kernels=numba") as server:
        assert server.complete("hello", max_tokens=8, temperature=0)["choices"] == expected
        assert f"compiled kernels in {files[0].parent} are damaged" in server.log.read_text()


async def test_a_thousand_aborted_requests_leave_nothing_behind(start_server):
    rng = random.Random(0)

    async def leave_early(client: httpx.AsyncClient, index: int) -> None:
        body = _body(index, stream=rng.random() < 0.5) | {"max_tokens": 300, "prompt": "word " * rng.randrange(1, 90)}
        try:
            async with asyncio.timeout(rng.random() * 0.6):
                await client.post("/v1/completions", json=body)
        except TimeoutError:
            pass

    limits = ["--set", "limits.max_queued_requests=2000", "--set", "limits.max_queued_tokens=1000000"]
    with start_server("--max-num-seqs", "16", *limits) as server:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=300)
        ) as client:
            for _ in range(10):
                await asyncio.gather(*(leave_early(client, i) for i in range(100)))

        def is_idle() -> bool:
            return (
                server.metric("peregrine_kv_blocks", state="owned") == 0
                and server.metric("peregrine_requests_running") == 0
                and server.metric("peregrine_requests_waiting") == 0
            )

        await asyncio.to_thread(server.wait_for, is_idle, 10)
        arrivals = server.metric("peregrine_requests_received_total")
        assert server.metric("peregrine_requests_total") == arrivals
        assert server.metric("peregrine_requests_total", outcome="abort") > 200  # the others were fast enough
        assert server.complete("still here?", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_health_tells_the_truth_from_the_first_second(start_server):
    with start_server(ready=False) as server:
        started_at = time.monotonic()
        server.wait_for(lambda: server.client.get("/livez").status_code == 200, 10)
        assert time.monotonic() - started_at < 10
        assert server.client.get("/readyz").status_code == 503  # the engine needs longer than HTTP
        assert server.client.get("/startupz").status_code == 503
        refused = server.client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        server.wait_until_ready()
        assert {server.client.get(path).status_code for path in ("/livez", "/readyz", "/startupz", "/health")} == {200}
