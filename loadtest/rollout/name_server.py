"""A name server for one name, so that a balancer finds replicas on loopback as it does among containers (RFC 1035)."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

_HEADER = struct.Struct("!6H")  # id, flags, and the numbers of questions, answers, authorities and additional records
_ANSWER = struct.Struct("!3HIH4s")  # name, type, class, seconds to live, length, address
_IS_ANSWER, _NO_SUCH_NAME = 0x8580, 0x8583  # authoritative, recursion is available
_TYPE_A, _CLASS_IN = 1, 1
_POINTER_TO_NAME = 0xC000 | _HEADER.size  # the name of the question


def answer(query: bytes, name: str, addresses: Sequence[str]) -> bytes:
    """The answer to a query: IPv4 addresses for `name`, none of other kinds, and an error for other names.

    Raises ValueError for what is no query of one question.
    """
    if len(query) < _HEADER.size or (header := _HEADER.unpack_from(query))[2] != 1:
        raise ValueError(f"{len(query)} bytes are not a query of one question")
    end = query.find(b"\0", _HEADER.size)
    if end < 0 or len(query) < end + 5:
        raise ValueError("the question ends in the middle")
    kind, _ = struct.unpack_from("!2H", query, end + 1)
    question = query[_HEADER.size : end + 5]
    is_known = _labels(query[_HEADER.size : end]) == name.lower().split(".")
    found = addresses if is_known and kind == _TYPE_A else ()
    records = b"".join(
        _ANSWER.pack(_POINTER_TO_NAME, _TYPE_A, _CLASS_IN, 1, 4, ipaddress.IPv4Address(address).packed)
        for address in found
    )
    flags = _IS_ANSWER if is_known else _NO_SUCH_NAME
    return _HEADER.pack(header[0], flags, 1, len(found), 0, 0) + question + records


def _labels(encoded: bytes) -> list[str]:
    labels = []
    while encoded:
        labels.append(encoded[1 : 1 + encoded[0]].decode("latin-1").lower())
        encoded = encoded[1 + encoded[0] :]
    return labels


class _Server(asyncio.DatagramProtocol):
    def __init__(self, name: str, addresses: Sequence[str]) -> None:
        self._name = name
        self._addresses = addresses
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        try:
            self._transport.sendto(answer(data, self._name, self._addresses), addr)
        except ValueError:
            return  # from a stranger; whoever asked waits in vain


@asynccontextmanager
async def name_server(name: str, addresses: Sequence[str]) -> AsyncIterator[str]:
    """Answers for `name` on a free port; yields ADDRESS:PORT."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Server(name, addresses), local_addr=("127.0.0.1", 0))
    try:
        host, port = transport.get_extra_info("sockname")
        yield f"{host}:{port}"
    finally:
        transport.close()
