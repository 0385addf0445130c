"""Chat templates that would run for ever or take all memory: a sentence for whoever asked, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys

import psutil
import pytest

from server.text.chat_renderer import ChatRenderer, TemplateLimits
from server.text.template_worker import Render
from tests.support.server_world import connect, make_world

MESSAGES = [{"role": "user", "content": "hello"}]
FINE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NESTED = "{% for i in range(99999) %}" * 6 + "{% endfor %}" * 6
ENDLESS = {
    "nested loops": (NESTED, "processor time"),
    "a loop inside a call": ("{{ (range(99999) | list) | sort | unique | list | length }}" * 100_000, "processor time"),
    "one long string": ("{{ 'a' * 10 ** 9 }}", "memory"),
    "long strings in a loop": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "memory",
    ),
    "a huge number": ("{{ (9 ** (10 ** 8)) % 7 }}", "processor time"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "called itself"),
    "a long answer": ("{{ 'a' * 2000000 }}", "characters"),
}


def make_request(template: str, limits: TemplateLimits, content: str = "hello") -> Render:
    return Render(
        template=template,
        turns=[{"role": "user", "content": content}],
        variables={},
        add_generation_prompt=False,
        continue_final_message=False,
        max_seconds=limits.max_seconds,
        max_characters=limits.max_characters,
        max_bytes=limits.max_bytes,
    )


@pytest.fixture(scope="module")
def renderer():
    renderer = ChatRenderer(TemplateLimits(max_seconds=0.3, max_characters=1_000_000, max_bytes=200 << 20))
    renderer.start()
    yield renderer
    renderer.close()


@pytest.mark.parametrize("kind", ENDLESS)
async def test_a_template_without_an_end_is_a_sentence_and_others_are_rendered_meanwhile(renderer, kind: str) -> None:
    template, reason = ENDLESS[kind]
    hostile = asyncio.ensure_future(renderer.render(make_request(template, renderer.limits)))
    assert await renderer.render(make_request(FINE, renderer.limits)) == "hello"
    with pytest.raises(ValueError, match=f"refused the messages: .*({reason}|too much memory)"):
        await hostile
    assert await renderer.render(make_request(FINE, renderer.limits)) == "hello"


OF_PARTS = {  # ways in which templates of multimodal models look for a text, and what a text alone would come to
    "parts by their type": "{% for m in messages %}[{{ m.role }}]{% for c in m.content | selectattr('type', 'equalto', "
    "'text') %}{{ c.text }}{% endfor %}{% endfor %}",
    "parts by their number": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }}{% endfor %}",
    "parts or a text": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "a text": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "a text that starts with something": "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}",
}


@pytest.mark.parametrize("kind", OF_PARTS)
async def test_a_text_is_shown_to_a_template_in_the_form_that_it_reads(renderer, kind: str) -> None:
    for content in ("hello", "{'type': 'text'}", "two\nlines", "again"):
        request = make_request(OF_PARTS[kind], renderer.limits, content)
        assert await renderer.render(request) == f"[user]{content}"


async def test_what_a_client_says_can_be_endless_too(world, client) -> None:
    """A template may be harmless and its loops be driven by the conversation."""
    template = (
        "{% for m in messages %}{% for n in messages %}{% for c in n['content'] %}{% endfor %}{% endfor %}{% endfor %}x"
    )
    async with connect(make_world(template)) as other:
        messages = [{"role": "user", "content": "x" * 1000}] * 2000
        response = await other.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert response.status_code == 400
        assert "processor time" in response.json()["error"]["message"]
        short = await other.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 2})
        assert short.status_code == 200


async def test_a_worker_that_somebody_kills_is_replaced() -> None:
    renderer = ChatRenderer()
    try:
        for _ in range(4):
            assert await renderer.render(make_request(FINE, renderer.limits)) == "hello"
            for child in list(renderer._workers.processes):
                os.kill(child.pid, signal.SIGKILL)
    finally:
        renderer.close()


async def test_many_conversations_at_once_are_each_answered_with_their_own(renderer) -> None:
    texts = [f"{i} é🙂" * (1 + 3000 * (i % 3)) for i in range(40)]
    requests = [make_request(FINE, renderer.limits, text) for text in texts]
    assert await asyncio.gather(*map(renderer.render, requests)) == texts


async def test_workers_know_no_secrets_and_end_with_their_renderer(monkeypatch) -> None:
    monkeypatch.setenv("PEREGRINE_API_KEY", "secret-key")
    renderer = ChatRenderer()
    await renderer.render(make_request(FINE, renderer.limits))
    (process,) = renderer._workers.processes
    assert "PEREGRINE_API_KEY" not in psutil.Process(process.pid).environ()
    renderer.close()
    assert not psutil.pid_exists(process.pid)


async def test_conversations_are_rendered_beside_thousands_of_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2048, hard)), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    renderer = ChatRenderer()
    try:
        assert await renderer.render(make_request(FINE, renderer.limits)) == "hello"
    finally:
        renderer.close()
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("limit", ["-v 33554432", "-t 600"])
def test_a_worker_lives_within_the_limits_that_its_server_has(limit: str) -> None:
    """ulimit sets the hard limits, too, which no process may raise again."""
    code = (
        "import asyncio; from server.text.chat_renderer import ChatRenderer\n"
        "from server.text.template_worker import Render\n"
        "renderer = ChatRenderer()\n"
        "for _ in range(2):\n"
        f"    print(asyncio.run(renderer.render(Render(template={FINE!r}, turns={MESSAGES!r}, variables={{}}, "
        "add_generation_prompt=False, continue_final_message=False, max_seconds=1, max_characters=99, "
        "max_bytes=1 << 28))))\n"
        "renderer.close()"
    )
    command = ["bash", "-c", f'ulimit {limit} && exec "$0" -c "$1"', sys.executable, code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["hello", "hello"], result.stderr[-2000:]


ODD_VALUES = [2**63 - 1, 2**64, 10**30, -(10**30), float("inf"), "\ud800", "x\x00", None, True, 1e-320]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
async def test_what_cannot_be_given_to_a_template_is_a_400(client, value: object) -> None:
    messages = [{"role": "user", "content": "hi"}]
    bodies = [
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"shade": value}}),
        (
            "/tokenize",
            {
                "messages": messages,
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"default": [value]}}}],
            },
        ),
        ("/tokenize", {"messages": messages, "chat_template_kwargs": {"shade": value}}),
    ]
    for path, body in bodies:
        data = json.dumps(body).replace("Infinity", "1e999")
        response = await client.post(path, content=data, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert len(response.json()["error"]["message"]) < 1000


async def test_half_a_character_that_a_template_writes_is_replaced_and_a_long_reason_cut(renderer) -> None:
    assert await renderer.render(make_request("{{ '\\ud800' }}x", renderer.limits)) == "?x"
    for template in ("{{ raise_exception('\\ud800' * 100000) }}", "{{ raise_exception(messages[0]['content']) }}"):
        with pytest.raises(ValueError, match="refused the messages") as caught:
            await renderer.render(make_request(template, renderer.limits, "y" * 100_000))
        assert len(str(caught.value)) < 2000
        str(caught.value).encode()
