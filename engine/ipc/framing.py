"""Frames on a stream socket: four bytes of little-endian length, then one message in MessagePack."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

from engine.ipc.messages import FromEngine, ToEngine

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 2**20  # a tokenizer of a quarter million entries takes 35 MB
READ_BYTES = 2**18

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """Bytes that are no valid frame: nothing after them on the stream can be read."""


def to_engine_decoder() -> msgspec.msgpack.Decoder[ToEngine]:
    return msgspec.msgpack.Decoder(ToEngine)


def from_engine_decoder() -> msgspec.msgpack.Decoder[FromEngine]:
    return msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytearray:
    """The message as a frame. Raises ValueError if it is longer than a frame may be."""
    frame = bytearray(HEADER.size)
    _encoder.encode_into(message, frame, HEADER.size)
    num_bytes = len(frame) - HEADER.size
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {num_bytes} bytes does not fit a frame of {MAX_FRAME_BYTES} bytes")
    HEADER.pack_into(frame, 0, num_bytes)
    return frame


class FrameReader(Generic[Message]):
    """An incremental decoder: messages from a byte stream that arrives in pieces of any size."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Returns the messages that `data` completes. Raises FrameError on bytes that are no frame."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (num_bytes,) = HEADER.unpack_from(self._buffer, start)
            if num_bytes > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {num_bytes} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = start + HEADER.size + num_bytes
            if len(self._buffer) < end:
                break
            messages.append(self._decode(bytes(self._buffer[start + HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return messages

    def _decode(self, payload: bytes) -> Message:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"a frame of {len(payload)} bytes that is no message: {error}") from error


class FrameSocket(Generic[Message]):
    """The engine's end of the socket, blocking. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._reader = FrameReader(decoder)
        self._send_lock = threading.Lock()

    def send(self, message: ToEngine | FromEngine) -> None:
        """Sends a message, on any thread. Blocks while the other end does not read; raises OSError if it is gone."""
        frame = encode_frame(message)
        with self._send_lock:  # two threads' frames must not interleave
            self._socket.sendall(frame)

    def receive(self, *, wait: bool) -> list[Message]:
        """All messages that have arrived; with `wait`, blocks until there are bytes.

        Raises EOFError once all before the end of the stream was returned, FrameError where it is damaged.
        """
        messages: list[Message] = []
        flags = 0 if wait else socket.MSG_DONTWAIT
        while (data := self._read(flags)) is not None:
            if not data:
                if messages:
                    return messages  # the next call raises EOFError
                raise EOFError("the other end closed the socket")
            messages += self._reader.feed(data)
            flags = socket.MSG_DONTWAIT
        return messages

    def _read(self, flags: int) -> bytes | None:
        """The next bytes; None if nothing has arrived, no bytes at the end of the stream."""
        try:
            return self._socket.recv(READ_BYTES, flags)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""


class FrameProtocol(asyncio.Protocol, Generic[Message]):
    """The server's end of the socket, in its event loop: calls `on_message` for each message as it arrives.

    `closed` gets its result when the stream has ended and every message before its end was handed over: None, or the
    FrameError that ended it.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Message], on_message: Callable[[Message], None]) -> None:
        self._reader = FrameReader(decoder)
        self._on_message = on_message
        self._transport: asyncio.Transport | None = None
        self._error: FrameError | None = None
        self.closed: asyncio.Future[FrameError | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not of asyncio's classes

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            messages = self._reader.feed(data)
        except FrameError as error:
            self._error = error
            self.close()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(self._error)

    def send(self, message: ToEngine | FromEngine) -> None:
        """Sends a message without blocking; after the end of the stream it is dropped."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
