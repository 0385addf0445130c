"""The file of API keys and the names of their tenants, read again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path

from server.http.auth import ApiKeys

logger = logging.getLogger("peregrine.server")

SECONDS_BETWEEN_LOOKS = 2.0
MAX_BYTES = 2**20
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # goes into logs


class KeyFileError(ValueError):
    """A key file that cannot be used. The message has no key."""


def read_key_file(path: Path) -> dict[str, str]:
    """{key: name} of a file with a line NAME KEY for each; empty lines and those that begin with # are passed over.

    Raises KeyFileError, with the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise KeyFileError(f"{path}: cannot be read: {reason}") from error
    if len(text) > MAX_BYTES:
        raise KeyFileError(f"{path}: has more than {MAX_BYTES} bytes; it takes a line NAME KEY for each key")
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 2:
            raise KeyFileError(f"{path}: line {number} has {len(parts)} words; write NAME KEY")
        name, key = parts
        if not NAME.fullmatch(name):
            raise KeyFileError(
                f"{path}: line {number}: a name has up to 64 letters, digits, dots, dashes and underscores"
            )
        if names.setdefault(key, name) != name:
            raise KeyFileError(f"{path}: line {number} has the key of {names[key]!r}; give each name keys of its own")
    return names


class KeyFile:
    """Keeps `keys` as the file says. Raises KeyFileError if it cannot be used when it is made; later, what was read
    before stays in force."""

    def __init__(self, path: Path, keys: ApiKeys) -> None:
        self._path = path
        self._keys = keys
        self._seen = self._look()
        keys.replace_named(read_key_file(path))

    def reload(self) -> None:
        """Reads the file now."""
        self._seen = self._look()
        try:
            names = read_key_file(self._path)
        except KeyFileError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        self._keys.replace_named(names)
        logger.info("%d keys of %d names are in force, from %s", len(names), len(set(names.values())), self._path)

    async def watch(self) -> None:
        """Reads the file whenever it has changed; to be cancelled."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            if self._look() != self._seen:
                self.reload()

    def _look(self) -> tuple[int, int, int] | None:
        """What differs when a file was written or replaced, by a link to another as well; None: it is not there."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
