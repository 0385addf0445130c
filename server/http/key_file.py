"""The file of API keys and the names of their tenants, read again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from server.generation.tenant_terms import TenantTerms
from server.http.auth import ApiKeys

logger = logging.getLogger("peregrine.server")

SECONDS_BETWEEN_LOOKS = 2.0
MAX_BYTES = 2**20
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # goes into logs
NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?")
LARGEST = {"weight": 1000.0, "tokens_per_minute": 1e12}


class KeyFileError(ValueError):
    """A key file that cannot be used. The message has no key."""


@dataclass(frozen=True, slots=True)
class KeyFileContents:
    """names: by key; terms: by name"""

    names: dict[str, str]
    terms: dict[str, TenantTerms]


def read_key_file(path: Path) -> KeyFileContents:
    """Reads a line NAME KEY for each key, with terms of its tenant behind; empty lines and those that begin with # are
    passed over.

    Terms are weight=NUMBER and tokens_per_minute=NUMBER, and stand behind any one key of a name.

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
    terms: dict[str, TenantTerms] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        try:
            _read_line(parts, names, terms)
        except ValueError as error:
            raise KeyFileError(f"{path}: line {number}: {error}") from error
    return KeyFileContents(names, terms)


def _read_line(parts: list[str], names: dict[str, str], terms: dict[str, TenantTerms]) -> None:
    if len(parts) < 2:
        raise ValueError("has one word; write NAME KEY, and terms behind them if there are any")
    name, key, *words = parts
    if not NAME.fullmatch(name):
        raise ValueError("a name has up to 64 letters, digits, dots, dashes and underscores")
    if names.setdefault(key, name) != name:
        raise ValueError(f"has the key of {names[key]!r}; give each name keys of its own")
    if words:
        given = _read_terms(words)
        if terms.setdefault(name, given) != given:
            raise ValueError(f"has other terms of {name} than a line before; write them once")


def _read_terms(words: list[str]) -> TenantTerms:
    """The words are not repeated in errors: one of them may be a key."""
    fields: dict[str, float] = {}
    for word in words:
        field, _, value = word.partition("=")
        if field not in LARGEST or field in fields or not NUMBER.fullmatch(value):
            raise ValueError(
                f"behind the key stand terms as weight=2 or tokens_per_minute=60000, of {', '.join(LARGEST)}"
            )
        fields[field] = float(value)
        if not 0 < fields[field] <= LARGEST[field]:
            raise ValueError(f"{field} is {value}; it must be above 0 and at most {LARGEST[field]:g}")
    quota = fields.get("tokens_per_minute")
    return TenantTerms(fields.get("weight", 1.0), None if quota is None else max(int(quota), 1))


class KeyFile:
    """Keeps `keys` as the file says. Raises KeyFileError if it cannot be used when it is made; later, what was read
    before stays in force."""

    def __init__(self, path: Path, keys: ApiKeys) -> None:
        self._path = path
        self._keys = keys
        self._seen = self._look()
        contents = read_key_file(path)
        keys.replace_named(contents.names, contents.terms)

    def reload(self) -> None:
        """Reads the file now."""
        self._seen = self._look()
        try:
            contents = read_key_file(self._path)
        except KeyFileError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        self._keys.replace_named(contents.names, contents.terms)
        names = contents.names
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
