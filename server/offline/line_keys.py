"""Which lines of a file are meant, by keys of sixteen bytes: millions of them fit into memory."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16


def id_key(custom_id: str) -> bytes:
    """The key of the line with that custom_id."""
    return hashlib.blake2b(b"id " + custom_id.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def number_key(number: int, digest: str) -> bytes:
    """The key of a line that has no custom_id of its own, by its number in the file and what is in it."""
    return hashlib.blake2b(b"line %d " % number + digest.encode(), digest_size=KEY_BYTES).digest()


def digest_of(data: bytes) -> str:
    """Of a line, short: another in its place is told from it."""
    return hashlib.blake2b(data.strip(), digest_size=6).hexdigest()


class KeyCollector:
    """Keys while they come, in any order; `sealed` when all are there."""

    def __init__(self) -> None:
        self._keys = bytearray()

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    def add(self, key: bytes) -> None:
        self._keys += key

    def sealed(self) -> SealedKeys:
        return SealedKeys(np.sort(np.frombuffer(bytes(self._keys), dtype=f"S{KEY_BYTES}")))


class SealedKeys:
    """A set of keys in sixteen bytes each. Members are found by bisection."""

    def __init__(self, ordered: NDArray[np.bytes_]) -> None:
        self._ordered = ordered

    def __len__(self) -> int:
        return len(self._ordered)

    def repeated(self) -> frozenset[bytes]:
        """The keys that came more than once."""
        keys = self._ordered
        again = np.unique(keys[1:][keys[1:] == keys[:-1]])
        return frozenset(key.ljust(KEY_BYTES, b"\0") for key in again.tolist())

    def __contains__(self, key: bytes) -> bool:
        wanted = np.frombuffer(key, dtype=self._ordered.dtype)[0]
        place = int(np.searchsorted(self._ordered, wanted))
        return place < len(self._ordered) and bool(self._ordered[place] == wanted)


NO_KEYS = SealedKeys(np.empty(0, dtype=f"S{KEY_BYTES}"))
