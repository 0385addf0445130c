"""A server in a process of its own, with a child, that writes down what happens: PORT LOG [SECONDS_BEFORE_LISTENING]

Lines of the log: a word and the time on the clock that all processes share. `alive` comes every few milliseconds, from
parent and child each, unless they are paused.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BEAT = 0.005  # seconds


def note(word: str) -> None:
    with open(sys.argv[2], "a") as log:
        log.write(f"{word} {time.perf_counter()}\n")


def beat(word: str) -> None:
    while True:
        note(word)
        time.sleep(BEAT)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer("application/json", json.dumps({"data": [{"id": "m"}], "version": "1.2"}).encode())

    def do_POST(self) -> None:
        note("asked")
        count = json.loads(self.rfile.read(int(self.headers["content-length"])))["max_tokens"]
        chunks = [{"choices": [{"text": " t", "finish_reason": None}]}] * count
        chunks += [{"choices": [{"text": "", "finish_reason": "length"}]}]
        chunks += [{"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": count}}]
        time.sleep(8 * BEAT)
        lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
        self.answer("text/event-stream", b"".join([*lines, b"data: [DONE]\n\n"]))
        note("answered")

    def answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def end(*_: object) -> None:
    note("ended")
    os._exit(0)


if __name__ == "__main__":
    note("started")
    if os.fork() == 0:
        os.setsid()  # as an engine process may: signals to the group do not reach it
        beat("child-alive")
    time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=beat, args=("alive",), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
