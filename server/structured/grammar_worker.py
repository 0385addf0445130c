"""A process that compiles grammars: `python -m server.structured.grammar_worker`, started by `grammar_checker`.

A schema may be a bomb: a few bytes that expand to gigabytes, or to hours. Here they meet limits, and where those do not
help, the process is killed and nothing is lost with it. What compiles here, the engine compiles too.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import msgspec

from engine.grammar import GrammarSpec
from engine.grammar_compiler import GrammarCompiler, GrammarError
from server.structured.schema_errors import JsonPath, explain
from server.text.worker_limits import frame, limited, read_frame

STACK_BYTES = 1 << 20  # half of what the engine's threads have


class Vocabulary(msgspec.Struct):
    """The first frame: the model's tokens."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: list[int]


class Check(msgspec.Struct):
    """A grammar to compile. Limits: processor seconds, bytes of memory. A `lark` grammar may be in GBNF instead."""

    spec: GrammarSpec
    max_seconds: float
    max_bytes: int


class Checked(msgspec.Struct):
    """spec: the grammar as the engine takes it; None where it is refused: then why, and which part of a schema it is"""

    spec: GrammarSpec | None
    seconds: float
    reason: str = ""
    path: JsonPath = []


def check(request: Check, compiler: GrammarCompiler | GrammarError) -> Checked:
    """compiler: or why there is none"""
    start = time.perf_counter()
    spec = request.spec
    try:
        if isinstance(compiler, GrammarError):
            raise compiler
        with limited(request.max_seconds, request.max_bytes, grace=0):  # nothing interrupts the library
            spec = _in_lark(spec)
            compiler.compile(spec)
    except GrammarError as error:
        reason, path = explain(str(error), spec)
        return Checked(None, time.perf_counter() - start, reason, path)
    except MemoryError:
        reason = f"it took more than {request.max_bytes >> 20} MiB of memory; simplify it"
        return Checked(None, time.perf_counter() - start, reason)
    return Checked(spec, time.perf_counter() - start)


def _in_lark(spec: GrammarSpec) -> GrammarSpec:
    """The grammar in Lark, where it was written in llama.cpp's GBNF, as its `::=` shows."""
    if spec.kind != "lark" or "::=" not in spec.text:
        return spec
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return msgspec.structs.replace(spec, text=any_to_lark(spec.text))
    except RecursionError as error:
        raise GrammarError("it is nested too deeply") from error
    except (ValueError, IndexError, KeyError, AssertionError) as error:
        raise GrammarError(f"it cannot be read as GBNF: {error}") from error


def _open_compiler(vocabulary: Vocabulary) -> GrammarCompiler | GrammarError:
    try:
        return GrammarCompiler(
            vocabulary.tokenizer_json, vocab_size=vocabulary.vocab_size, eos_token_ids=vocabulary.eos_token_ids
        )
    except GrammarError as error:
        return error


def _serve() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    first = read_frame(requests)
    if first is None:
        return
    compiler = _open_compiler(msgspec.msgpack.decode(first, type=Vocabulary))
    decoder = msgspec.msgpack.Decoder(Check)
    while (data := read_frame(requests)) is not None:
        answers.write(frame(check(decoder.decode(data), compiler)))
        answers.flush()


def main() -> None:
    """In a thread of a small stack: what is nested too deeply ends this process, and never the engine."""
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
