"""A server in a process of its own that tells what its drafts did: PORT [--speculative-config JSON]

Its texts follow from prompt and seed. It drafts two tokens per answer, of which the first is accepted. The method
`wrong` gives every fifth request another text, `dies` ends at the fifth, and `unknown` is none.
"""

import json
import os
import sys
import zlib

from tests.support.scripted_server import DONE, Reply, ScriptedServer, Served, event

METHOD = json.loads(sys.argv[3])["method"] if len(sys.argv) > 3 else "none"


def answer(index: int, served: Served) -> Reply:
    if METHOD == "dies" and index == 5:
        os._exit(3)
    count, asked = served.body["max_tokens"], [served.body.get(name) for name in ("prompt", "messages", "seed")]
    text = f" {zlib.crc32(json.dumps(asked).encode())}" + (" oh" if METHOD == "wrong" and index % 5 == 4 else "")
    details = {"accepted_prediction_tokens": int(METHOD != "none"), "rejected_prediction_tokens": int(METHOD != "none")}
    num_words = len(json.dumps(asked).split())
    usage = {"prompt_tokens": num_words, "completion_tokens": count, "completion_tokens_details": details}
    end = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    pieces = [event(text, chat="messages" in served.body), event(finish_reason="length"), end, DONE]
    return Reply(tuple((0.0, piece) for piece in pieces))


def metrics() -> str:
    count = len(server.served) if METHOD != "none" else 0
    labels = f'model_name="m",proposer="{METHOD}"'
    accepted = f'peregrine_accepted_draft_tokens_total{{{labels},position="0"}} {count}.0\n' if count else ""
    return (
        f"# TYPE peregrine_drafts_total counter\nperegrine_drafts_total{{{labels}}} {count}.0\n"
        f"# TYPE peregrine_draft_tokens_total counter\nperegrine_draft_tokens_total{{{labels}}} {2 * count}.0\n"
        f"# TYPE peregrine_accepted_draft_tokens_total counter\n{accepted}"
    )


if __name__ == "__main__":
    if METHOD == "unknown":
        sys.exit("there is no such method")
    server = ScriptedServer(answer, port=int(sys.argv[1]), metrics=metrics)
