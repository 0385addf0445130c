"""What the engine is computing right now, in memory that outlives it.

The child writes the note before each step and clears it after; the parent reads it when the child is dead. So a crash
that leaves no time for a last word, kill -9 included, still names the requests that were in the batch.
"""

from __future__ import annotations

import mmap
import os
import struct

import msgspec

from engine.types import Scheduled

NOTE_BYTES = 2**20  # of address space; only pages that were written take memory
LENGTH = struct.Struct("<I")


class BatchLine(msgspec.Struct, frozen=True, array_like=True):
    """One request of the batch: its shape, not its contents."""

    request_id: str
    num_computed_tokens: int
    num_new_tokens: int
    num_drafts: int


class CrashNote:
    """One shared area, mapped by both processes: four bytes of length, then the batch in MessagePack."""

    def __init__(self, fd: int) -> None:
        """Maps the area of `fd` and closes it: the mapping stays."""
        self._memory = mmap.mmap(fd, NOTE_BYTES)
        os.close(fd)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def write(self, batch: list[Scheduled]) -> None:
        """Takes microseconds. A batch too long for the area is cut."""
        lines = [
            BatchLine(item.seq.request.request_id, item.seq.num_computed_tokens, item.num_new_tokens, item.num_drafts)
            for item in batch
        ]
        self._encoder.encode_into(lines, self._buffer)
        while len(self._buffer) > NOTE_BYTES - LENGTH.size:
            lines = lines[: len(lines) // 2]
            self._encoder.encode_into(lines, self._buffer)
        self.clear()  # a crash between the two writes leaves no note rather than a wrong one
        self._memory[LENGTH.size : LENGTH.size + len(self._buffer)] = bytes(self._buffer)
        LENGTH.pack_into(self._memory, 0, len(self._buffer))

    def clear(self) -> None:
        LENGTH.pack_into(self._memory, 0, 0)

    def read(self) -> list[BatchLine]:
        """The batch of the step that was cut short; empty if none was, or if the child damaged its note."""
        (num_bytes,) = LENGTH.unpack_from(self._memory, 0)
        if not 0 < num_bytes <= NOTE_BYTES - LENGTH.size:
            return []
        try:
            return msgspec.msgpack.decode(self._memory[LENGTH.size : LENGTH.size + num_bytes], type=list[BatchLine])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []

    def close(self) -> None:
        self._memory.close()


def create_note_fd() -> int:
    """Makes an empty area, for `CrashNote` in this process (through `os.dup`) and in the child that inherits it."""
    fd = os.memfd_create("peregrine-crash-note")
    os.ftruncate(fd, NOTE_BYTES)
    return fd
