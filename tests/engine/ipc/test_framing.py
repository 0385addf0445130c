"""Frames survive any cut of the stream, and damage is noticed."""

from __future__ import annotations

import asyncio
import random
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ipc.framing import (
    HEADER,
    MAX_FRAME_BYTES,
    FrameError,
    FrameProtocol,
    FrameReader,
    FrameSocket,
    encode_frame,
    from_engine_decoder,
    to_engine_decoder,
)
from engine.ipc.messages import Abort, Add, Configure, Failed, FromEngine, Heartbeat, Phase, Shutdown, Step, ToEngine
from engine.types import Request, RequestTiming, SamplingParams, StepOutput, TokenLogprobs

token_ids = st.lists(st.integers(0, 2**31), max_size=50)
requests = st.builds(
    Request,
    request_id=st.text(),
    prompt_token_ids=token_ids,
    output_token_ids=token_ids,
    params=st.builds(
        SamplingParams,
        seed=st.integers(-(2**63), 2**63 - 1),
        max_tokens=st.integers(0, 100),
        logit_bias=st.dictionaries(st.integers(0, 100), st.floats(-100, 100), max_size=3),
        bad_words=st.lists(token_ids, max_size=2),
    ),
)
to_engine = st.one_of(
    st.builds(Configure, st.text()),
    st.builds(Add, requests),
    st.builds(Abort, st.lists(st.text(), max_size=5)),
    st.builds(Shutdown),
)
logprobs = st.builds(
    TokenLogprobs, st.integers(0, 9), st.floats(-9, 0), st.integers(1, 9), token_ids, st.lists(st.floats(-9, 0))
)
timings = st.builds(
    RequestTiming,
    queued=st.floats(0, 9),
    prefill=st.floats(0, 9),
    decode=st.floats(0, 9),
    num_prefill_chunks=st.integers(0, 9),
    num_preemptions=st.integers(0, 9),
    num_drafts=st.integers(0, 9),
    num_accepted_drafts=st.integers(0, 9),
)
outputs = st.builds(
    StepOutput,
    request_id=st.text(),
    token_ids=token_ids,
    finish_reason=st.sampled_from([None, "stop", "length", "error"]),
    logprobs=st.none() | st.lists(logprobs, max_size=3),
    timing=st.none() | timings,
)
from_engine = st.one_of(
    st.builds(Phase, st.text(), st.text()),
    st.builds(Heartbeat, st.floats(0, 100)),
    st.builds(Failed, st.text(), st.text()),
    st.builds(Step, st.lists(outputs, max_size=4), st.lists(st.text(), max_size=3), st.none(), st.integers(0, 2**40)),
)


def feed_in_pieces(reader: FrameReader, stream: bytes, cuts: random.Random) -> list:
    messages = []
    while stream:
        size = cuts.randint(1, max(1, min(len(stream), 40)))
        messages += reader.feed(stream[:size])
        stream = stream[size:]
    return messages


@settings(max_examples=60, deadline=None)
@given(st.lists(to_engine, max_size=6), st.lists(from_engine, max_size=6), st.randoms(use_true_random=False))
def test_messages_come_out_as_they_went_in_wherever_the_stream_is_cut(
    inward: list[ToEngine], outward: list[FromEngine], cuts: random.Random
) -> None:
    for messages, decoder in ((inward, to_engine_decoder()), (outward, from_engine_decoder())):
        stream = b"".join(bytes(encode_frame(message)) for message in messages)
        assert feed_in_pieces(FrameReader(decoder), stream, cuts) == messages


@settings(max_examples=200, deadline=None)
@given(st.lists(to_engine, min_size=1, max_size=3), st.data())
def test_a_damaged_stream_gives_messages_or_a_frame_error_and_nothing_else(
    messages: list[ToEngine], data: st.DataObject
) -> None:
    stream = bytearray(b"".join(bytes(encode_frame(message)) for message in messages))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        received = FrameReader(to_engine_decoder()).feed(bytes(stream))
    except FrameError:
        return
    assert all(isinstance(message, ToEngine) for message in received)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_a_frame_of_random_bytes_is_a_frame_error_or_a_message(payload: bytes) -> None:
    reader = FrameReader(from_engine_decoder())
    try:
        received = reader.feed(HEADER.pack(len(payload)) + payload)
    except FrameError:
        return
    assert all(isinstance(message, FromEngine) for message in received)


@pytest.mark.parametrize("num_bytes", [MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_frame_longer_than_the_limit_is_refused_before_its_bytes_arrive(num_bytes: int) -> None:
    with pytest.raises(FrameError, match=str(num_bytes)):
        FrameReader(to_engine_decoder()).feed(HEADER.pack(num_bytes))


def test_frames_of_many_threads_do_not_interleave() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = FrameSocket(theirs, to_engine_decoder()), FrameSocket(ours, from_engine_decoder())
        threads = [
            threading.Thread(target=lambda i=i: [sender.send(Phase(str(i), "x" * 50_000)) for _ in range(20)])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        messages: list[FromEngine] = []
        while len(messages) < 80:
            messages += receiver.receive(wait=True)
        for thread in threads:
            thread.join()
    assert sorted(message.name for message in messages) == sorted("0123" * 20)


def test_receiving_without_waiting_returns_nothing_and_the_end_is_an_eof_error() -> None:
    ours, theirs = socket.socketpair()
    receiver = FrameSocket(ours, to_engine_decoder())
    with ours:
        assert receiver.receive(wait=False) == []
        theirs.sendall(bytes(encode_frame(Shutdown()))[:3])  # half a frame
        assert receiver.receive(wait=True) == []
        theirs.close()
        with pytest.raises(EOFError):
            receiver.receive(wait=True)


def test_what_came_before_the_end_is_received_before_the_end() -> None:
    ours, theirs = socket.socketpair()
    receiver = FrameSocket(ours, to_engine_decoder())
    with ours:
        with theirs:
            theirs.sendall(bytes(encode_frame(Shutdown())))
        assert receiver.receive(wait=True) == [Shutdown()]
        with pytest.raises(EOFError):
            receiver.receive(wait=True)


async def connect(sock: socket.socket, received: list[FromEngine]) -> FrameProtocol:
    protocol = FrameProtocol(from_engine_decoder(), received.append)
    sock.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: protocol, sock=sock)
    return protocol


async def test_the_asyncio_end_hands_over_every_message_before_it_says_closed() -> None:
    ours, theirs = socket.socketpair()
    received: list[FromEngine] = []
    protocol = await connect(ours, received)
    with theirs:
        theirs.sendall(b"".join(bytes(encode_frame(Heartbeat(float(i)))) for i in range(100)))
    assert await protocol.closed is None
    assert received == [Heartbeat(float(i)) for i in range(100)]
    protocol.send(Shutdown())  # dropped without an error


async def test_the_asyncio_end_closes_at_a_broken_frame_and_says_why() -> None:
    ours, theirs = socket.socketpair()
    received: list[FromEngine] = []
    protocol = await connect(ours, received)
    with theirs:
        theirs.sendall(bytes(encode_frame(Heartbeat(1.0))) + HEADER.pack(3) + b"\xc1\xc1\xc1")
        error = await asyncio.wait_for(protocol.closed, 5)
    assert isinstance(error, FrameError)
    assert received == []  # or the messages before it: here they came in one piece with it
