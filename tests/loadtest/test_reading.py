"""Events out of bytes, tokens out of events, and the connections under them."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client.answer_reader import AnswerReader, EventSplitter
from loadtest.client.client import Api, Client, IgnoreEos, Target
from loadtest.client.outcome import Answer
from loadtest.client.transport import Connections
from loadtest.workload.prompts import Exchange
from tests.support.scripted_server import DONE, Reply, event, whole_answer

payloads = st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=8)


@given(payloads, st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 400), max_size=10), st.booleans())
def test_events_are_the_same_however_the_bytes_were_cut(
    payloads: list[bytes], newline: bytes, cuts: list[int], with_comments: bool
) -> None:
    comment = b": keep-alive" + newline + newline + b"id: 7" + newline if with_comments else b""
    stream = b"".join(comment + b"data: " + payload + newline + newline for payload in payloads)
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    splitter = EventSplitter()
    events = []
    for start, end in pairwise(bounds):
        events += splitter.feed(stream[start:end])
    assert events == payloads
    assert splitter.is_between_events


def test_several_data_lines_are_one_event() -> None:
    assert EventSplitter().feed(b"data: a\ndata:b\n\ndata: c\n\n") == [b"a\nb", b"c"]


def test_part_of_an_event_is_no_event() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b'data: {"x": 1}\n') == []
    assert not splitter.is_between_events


def read(pieces: list[tuple[float, bytes]], asked: int | None) -> Answer:
    reader = AnswerReader(asked)
    for received_at, piece in pieces:
        reader.feed(received_at, piece)
    outcome = reader.outcome(started_at=0.0, sent_at=0.0)
    assert isinstance(outcome, Answer), outcome
    return outcome


def test_a_chunk_of_several_tokens_is_one_gap_and_zeros() -> None:
    """Seven tokens in chunks of 3, 1, 2 and 1, as with speculation: six latencies, of which three are waits."""
    pieces = [(1.0, event("abc")), (1.5, event("d")), (1.75, event("ef")), (2.75, event("g", finish_reason="length"))]
    answer = read([*pieces, (2.75, event(usage=(4, 7))), (2.8, DONE)], 7)
    assert sorted(answer.inter_token_latencies()) == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0]
    assert answer.time_to_first_token == 1.0
    assert answer.time_per_output_token == pytest.approx(1.75 / 6)
    assert answer.end_to_end == 2.8


def test_continuous_usage_counts_the_same_as_usage_at_the_end() -> None:
    usage = [(1.0, event("ab", usage=(4, 2))), (2.0, event("c", finish_reason="length", usage=(4, 3)))]
    answer = read([*usage, (2.0, event(usage=(4, 3))), (2.0, DONE)], 3)
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.is_counted) == (4, 3, False)


def test_without_usage_chunks_with_text_are_counted() -> None:
    pieces = [(0.5, event("", chat=True)), (1.0, event("a", chat=True)), (2.0, event("b", chat=True))]
    answer = read([*pieces, (2.0, event(finish_reason="length", chat=True)), (2.0, DONE)], 5)
    assert (answer.num_output_tokens, answer.is_counted) == (2, True)
    assert answer.time_to_first_token == 1.0  # the chunk that only names the role is no token


def test_last_tokens_without_text_end_with_the_finish_reason() -> None:
    pieces = [(1.0, event("a")), (4.0, event(finish_reason="length")), (4.0, event(usage=(2, 3))), (4.0, DONE)]
    answer = read(pieces, 3)
    assert answer.time_per_output_token == pytest.approx(1.5)
    only_special = read([(3.0, event(finish_reason="length")), (3.0, event(usage=(2, 1))), (3.0, DONE)], 1)
    assert (only_special.time_to_first_token, only_special.inter_token_latencies()) == (3.0, [])


async def test_the_body_says_what_was_asked_for_and_nulls_take_fields_out(serve) -> None:
    server = serve(lambda _, served: whole_answer(served))
    extra = {"stream_options": None, "top_k": 1, "temperature": 0.5}
    target = Target(server.url + "/v1/", model="m", extra_body=extra, api_key="secret")
    async with Client(target) as client:
        assert isinstance(await client.send(Exchange([9, 8], 3)), Answer)
    request = server.served[0]
    expected = {"model": "m", "prompt": [9, 8], "max_tokens": 3, "temperature": 0.5, "stream": True}
    assert request.body == {**expected, "ignore_eos": True, "top_k": 1}
    assert (request.path, request.headers["authorization"]) == ("/v1/completions", "Bearer secret")


async def test_chat_sends_a_message_and_refuses_token_ids(serve) -> None:
    server = serve(lambda _, served: whole_answer(served))
    async with Client(Target(server.url, model="m", api=Api.CHAT, ignore_eos=IgnoreEos.ELSEWHERE)) as client:
        assert isinstance(await client.send(Exchange("hello", 2)), Answer)
        with pytest.raises(ValueError, match="text prompts"):
            await client.send(Exchange([1], 2))
    assert server.served[0].path == "/v1/chat/completions"
    assert server.served[0].body["messages"] == [{"role": "user", "content": "hello"}]
    assert "ignore_eos" not in server.served[0].body


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_bodies_are_whole_in_either_framing(serve, framing: str) -> None:
    text = b"x" * 200_000
    server = serve(lambda *_: Reply(((0.0, text), (0.01, b"end")), framing=framing))
    connections = Connections(server.url, keeps_alive=False)
    pieces: list[bytes] = []
    async with connections.one() as connection:
        request = b"POST / HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        await connection.exchange(request, lambda status, kind: lambda received_at, piece: pieces.append(piece))
    await connections.close()
    assert b"".join(pieces) == text + b"end"


async def test_each_request_has_its_own_connection(serve) -> None:
    server = serve(lambda _, served: whole_answer(served))
    async with Client(Target(server.url, model="m")) as client:
        for _ in range(3):
            await client.send(Exchange([1], 1))
    assert server.num_connections == 3
    assert server.served[0].headers["connection"] == "close"


async def test_kept_connections_are_used_again_one_after_another_and_shared_by_none(serve) -> None:
    server = serve(lambda _, served: whole_answer(served, first=0.02))
    async with Client(Target(server.url, model="m", keeps_alive=True)) as client:
        for _ in range(3):
            await client.send(Exchange([1], 1))
        assert server.num_connections == 1
        outcomes = await asyncio.gather(*(client.send(Exchange([1], 1)) for _ in range(4)))
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert server.num_connections == 4


async def test_a_broken_connection_is_not_used_again(serve) -> None:
    def first_breaks(index: int, served) -> object:
        broken = Reply(((0.0, event("a")),), ending="disconnect")
        return broken if index == 0 else whole_answer(served)

    server = serve(first_breaks)
    async with Client(Target(server.url, model="m", keeps_alive=True)) as client:
        kinds = [type(await client.send(Exchange([1], 1))).__name__ for _ in range(3)]
    assert kinds == ["Failure", "Answer", "Answer"]
    assert server.num_connections == 2
