"""Clients that no library would make: they send parts of requests, read nothing, and leave as they like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from urllib.parse import urlsplit

from loadtest.client.client import Target
from loadtest.workload.prompts import Exchange

SMALL_BUFFER = 4096  # bytes
SMALL_SEGMENT = 536  # bytes: on loopback the server's side would keep megabytes in segments of 64 KB
CONNECT_PATIENCE = 10.0  # seconds


def request_bytes(target: Target, exchange: Exchange, *, stream: bool, num_logprobs: int | None = None) -> bytes:
    """An HTTP request for a completion, on a connection that is closed after it."""
    fields = {
        "model": target.model,
        "prompt": exchange.prompt,
        "max_tokens": exchange.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "logprobs": num_logprobs,
    }
    body = json.dumps(fields).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {urlsplit(target.base_url).netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in target.authorization.items()),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


class RawConnection:
    """A connection whose buffers are small and whose end is ours to choose."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    async def open(cls, target: Target) -> RawConnection:
        """Raises OSError where none comes about."""
        parts = urlsplit(target.base_url)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
        connection.setblocking(False)
        try:
            address = (parts.hostname or "", parts.port or 80)
            async with asyncio.timeout(CONNECT_PATIENCE):
                await asyncio.get_running_loop().sock_connect(connection, address)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    async def send(self, data: bytes) -> None:
        """Raises OSError if the server has left."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read_some(self, *, patience: float) -> bytes:
        """What has come; nothing where nothing comes in time, or the server has left."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(patience):
                return await asyncio.get_running_loop().sock_recv(self._socket, SMALL_BUFFER)
        return b""

    async def ends(self, *, patience: float) -> bool:
        """Whether the server ends it in time. What has come until then is read."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                while await loop.sock_recv(self._socket, 65536):
                    pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def reset(self) -> None:
        """Leaves at once, as a machine does that has lost its power: the server gets an RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        self._socket.close()
