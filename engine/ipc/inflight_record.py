"""The in-flight record: which requests are in the step that the engine is computing, in memory shared with the server.

The engine process writes it before each step and clears it after; the server reads it when that process has died. So
a death without warning, kill -9 included, still names the requests that were in the batch.
"""

from __future__ import annotations

import mmap
import os
import struct

import msgspec

from engine.types import Scheduled

RECORD_BYTES = 2**20  # of address space; only pages that were written take memory
LENGTH = struct.Struct("<I")


class InflightRequest(msgspec.Struct, frozen=True, array_like=True):
    """One request of the batch: sizes, no contents."""

    request_id: str
    num_computed_tokens: int
    num_new_tokens: int
    num_drafts: int


class InflightRecord:
    """The shared memory, mapped by both processes: four bytes of length, then the batch in MessagePack."""

    def __init__(self, fd: int) -> None:
        """Maps the memory of `fd`, and closes `fd`; the mapping stays."""
        self._memory = mmap.mmap(fd, RECORD_BYTES)
        os.close(fd)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def write(self, batch: list[Scheduled]) -> None:
        """Records a batch, in microseconds. One that is too long for the memory is cut short."""
        requests = [
            InflightRequest(
                item.seq.request.request_id, item.seq.num_computed_tokens, item.num_new_tokens, item.num_drafts
            )
            for item in batch
        ]
        self._encoder.encode_into(requests, self._buffer)
        while len(self._buffer) > RECORD_BYTES - LENGTH.size:
            requests = requests[: len(requests) // 2]
            self._encoder.encode_into(requests, self._buffer)
        self.clear()  # so that a crash between the two writes leaves an empty record, not a wrong one
        self._memory[LENGTH.size : LENGTH.size + len(self._buffer)] = bytes(self._buffer)
        LENGTH.pack_into(self._memory, 0, len(self._buffer))

    def clear(self) -> None:
        LENGTH.pack_into(self._memory, 0, 0)

    def read(self) -> list[InflightRequest]:
        """The batch of the step that runs, or was interrupted; empty if there is none, or if the memory was damaged."""
        (num_bytes,) = LENGTH.unpack_from(self._memory, 0)
        if not 0 < num_bytes <= RECORD_BYTES - LENGTH.size:
            return []
        try:
            return msgspec.msgpack.decode(
                self._memory[LENGTH.size : LENGTH.size + num_bytes], type=list[InflightRequest]
            )
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []

    def close(self) -> None:
        self._memory.close()


def create_record_fd() -> int:
    """Empty shared memory, for an `InflightRecord` here (of `os.dup`) and one in the child that inherits it."""
    fd = os.memfd_create("peregrine-inflight")
    os.ftruncate(fd, RECORD_BYTES)
    return fd
