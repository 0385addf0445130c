"""The longest time for which a server's event loop does not answer, while one client sends what is large.

`python -m loadtest.micro.loop_gap [--save]` starts a server on the default model and asks GET /livez over and over,
from a process of its own, beside each body of a table. A gap is the longest of those round trips; of a few rounds the
smallest, as others' work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import httpx

from loadtest.micro.measure import Row, print_table, save
from loadtest.micro.own_server import own_server

MEGABYTE = 1 << 20
PAUSE = 0.0005  # seconds between two probes
START_PATIENCE = 120.0  # seconds
ANSWER_PATIENCE = 300.0

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGE, ENTRY = '{"role":"user","content":"a"}', '"#":1'
Bodies = dict[str, tuple[str, Callable[[], str]]]
"""Path and body by name. Made one after the other, as together they are some hundred megabytes."""


def text(size: int) -> str:
    return json.dumps("the quick brown fox " * (size // 20))


def many(number: int, item: str) -> str:
    """The item so often; `#` in it is replaced by its number."""
    return ",".join(item.replace("#", str(i)) for i in range(number))


def completion(**fields: str) -> tuple[str, Callable[[], str]]:
    return COMPLETIONS, lambda: _object({"model": '"MODEL"', "max_tokens": "1", "prompt": '"a"', **fields})


def chat(messages: str) -> tuple[str, Callable[[], str]]:
    return CHAT, lambda: _object({"model": '"MODEL"', "max_tokens": "1", "messages": messages})


def _object(fields: dict[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def texts() -> Bodies:
    long = text(15 * MEGABYTE)
    return {
        "nothing, for comparison": ("/tokenize", lambda: '{"prompt":"a"}'),
        "15 MB of text to /tokenize": ("/tokenize", lambda: _object({"prompt": long})),
        "1 MB of text to /tokenize": ("/tokenize", lambda: _object({"prompt": text(MEGABYTE - 100)})),
        "1 MB of emoji to /tokenize": ("/tokenize", lambda: _object({"prompt": f'"{"🙂" * (MEGABYTE // 4)}"'})),
        "one word of 1 MB to /tokenize": ("/tokenize", lambda: _object({"prompt": f'"{"x" * MEGABYTE}"'})),
        "a prompt of 15 MB": completion(prompt=long),
        "a prompt of 500 kB": completion(prompt=text(500_000)),
        "15 MB, the last 100 tokens": completion(prompt=long, truncate_prompt_tokens="100"),
        "15 MB without a blank, the last 100 tokens": completion(
            prompt=f'"{"x" * 15 * MEGABYTE}"', truncate_prompt_tokens="100"
        ),
        "15 MB of chat": chat(f'[{{"role":"user","content":{long}}}]'),
    }


def values() -> Bodies:
    return {
        "2,000 messages": chat(f"[{many(2000, MESSAGE)}]"),
        "300,000 messages": chat(f"[{many(300_000, MESSAGE)}]"),
        "a million unknown fields": completion(x="1," + many(1_000_000, '"f#":1')),
        "30,000 unknown fields": completion(x="1," + many(30_000, '"f#":1')),
        "a million entries of metadata": completion(metadata="{" + many(1_000_000, ENTRY) + "}"),
        "30,000 entries of logit_bias": completion(logit_bias="{" + many(30_000, ENTRY) + "}"),
        "200,000 stop strings": completion(stop="[" + many(200_000, '"x"') + "]"),
        "5 million token ids as a prompt": completion(prompt=f"[{many(5_000_000, '5')}]"),
        "250,000 token ids as a prompt": completion(prompt=f"[{many(250_000, '5')}]"),
        "250,000 allowed_token_ids": completion(allowed_token_ids=f"[{many(250_000, '5')}]"),
        "lists a million deep": completion(x="[" * MEGABYTE + "]" * MEGABYTE),
        "7 million ids to /detokenize": ("/detokenize", lambda: _object({"tokens": f"[{many(7_000_000, '5')}]"})),
        "250,000 ids to /detokenize": ("/detokenize", lambda: _object({"tokens": f"[{many(250_000, '5000')}]"})),
        "echo with 20 log-probabilities of 1,900 tokens": completion(
            echo="true", logprobs="20", prompt=f"[{many(1900, '5')}]"
        ),
    }


def combinations() -> Bodies:
    """What is small in each of its parts, or just small enough to be read in the event loop."""
    prompt, inline = text(4000), 260_000
    words = ",".join(json.dumps(chr(0x4E00 + i) * 3 + "🙂é" * 60) for i in range(256))
    stops = ",".join(json.dumps("ab" * 500 + str(i)) for i in range(16))
    part = '{"type":"text","text":""}'
    return {
        "250 kB of unknown fields": completion(x="1," + many(inline // 10, '"f#":1')),
        "250 kB of empty lists": completion(x=f"[{many(inline // 3, '[]')}]"),
        "250 kB of parts of messages": chat(
            "[" + ",".join([f'{{"role":"user","content":[{many(250, part)}]}}'] * (inline // 6600)) + "]"
        ),
        "250 kB of chat_template_kwargs": (
            CHAT,
            lambda: _object(
                {
                    "model": '"MODEL"',
                    "messages": f"[{MESSAGE}]",
                    "max_tokens": "1",
                    "chat_template_kwargs": "{" + many(20_000, ENTRY) + "}",
                }
            ),
        ),
        "48,000 allowed_token_ids": completion(allowed_token_ids=f"[{many(48_000, '#')}]"),
        "256 bad_words of 128 characters": completion(bad_words=f"[{words}]"),
        "16 stop strings of 1,000 characters": completion(stop=f"[{stops}]"),
        "64 prompts of 4,000 characters": completion(prompt="[" + ",".join([prompt] * 64) + "]"),
        "64 prompts of 4,000 characters with echo": completion(
            prompt="[" + ",".join([prompt] * 64) + "]", echo="true", max_tokens="0"
        ),
        "1,000 choices of 1,000 ids": completion(
            prompt="[" + ",".join([f"[{many(1000, '5')}]"] * 50) + "]", n="20", max_tokens="1", timeout="2"
        ),
        "128 choices of 12 tokens with log-probabilities": completion(n="128", max_tokens="12", logprobs="20"),
        "a stream of 128 choices": completion(n="128", max_tokens="12", stream="true", ignore_eos="true"),
        "names of a model, a user and a field of 5 MB each": completion(
            user=text(5 * MEGABYTE), model=text(5 * MEGABYTE), **{"f" * 5 * MEGABYTE: "1"}
        ),
        "1 MB to /tokenize, with token_strs": (
            "/tokenize",
            lambda: _object({"prompt": text(MEGABYTE - 100), "return_token_strs": "true"}),
        ),
    }


def probe(address: str, is_over: Event, answer: Connection) -> None:
    """Asks until it is over. Sends 0 when it has begun, and at the end the longest round trip, in seconds."""
    connection = http.client.HTTPConnection(address)
    connection.request("GET", "/livez")
    connection.getresponse().read()
    answer.send(0.0)
    longest = 0.0
    while not is_over.is_set():
        begun_at = time.perf_counter()
        connection.request("GET", "/livez")
        connection.getresponse().read()
        longest = max(longest, time.perf_counter() - begun_at)
        time.sleep(PAUSE)
    answer.send(longest)


def measure(url: str, path: str, body: bytes) -> tuple[float, float, int]:
    """(longest round trip of a probe, seconds until the answer, its status)"""
    context = multiprocessing.get_context("spawn")
    is_over = context.Event()
    answers, answer = context.Pipe(duplex=False)
    prober = context.Process(target=probe, args=(url.removeprefix("http://"), is_over, answer))
    prober.start()
    answer.close()  # here; where the process ends early, nothing is waited for
    try:
        answers.recv()
        begun_at = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        status = httpx.post(url + path, content=body, headers=headers, timeout=ANSWER_PATIENCE).status_code
        seconds = time.perf_counter() - begun_at
    finally:
        is_over.set()
    longest: float = answers.recv()
    prober.join()
    return longest, seconds, status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    parser.add_argument("arguments", nargs="*", help="of the server, after --")
    options = parser.parse_args()
    rows: list[Row] = []
    with own_server(options.arguments, patience=START_PATIENCE) as url:
        model = httpx.get(url + "/v1/models").json()["data"][0]["id"]
        for name, (path, make) in {**texts(), **values(), **combinations()}.items():
            body = make().replace("MODEL", model, 1).encode()
            measured = [measure(url, path, body) for _ in range(options.rounds)]
            gap, seconds, status = min(measured)
            rows.append(
                {
                    "body": name,
                    "MB": round(len(body) / 1e6, 2),
                    "status": status,
                    "answered after, ms": round(1e3 * seconds, 1),
                    "longest gap, ms": round(1e3 * gap, 1),
                }
            )
            print(f"{name}: {1e3 * gap:.1f} ms", flush=True)
    print_table(rows)
    if options.save:
        print(save("loop-gap", rows))


if __name__ == "__main__":
    main()
