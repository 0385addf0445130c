"""An upload: a multipart form (RFC 7578) with a file and a few fields, written to the disk as it comes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

from server.errors import ApiError, bad_request
from server.offline.answer_file import is_full

BUFFER = 1 << 18  # bytes that are written to the disk at once
MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
MAX_NAME = 255  # characters of a file's name that are kept
MAX_SECONDS = 3600.0  # that an upload may take
KNOWN_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Upload:
    """The form while it is read. Its file is at `path` from the first byte on; `remove` it if nothing becomes of it."""

    def __init__(self, path: Path, content_type: str, *, max_file_bytes: int, check: Callable[[int], None]) -> None:
        """check: told of how many bytes the file has so far; raises ApiError where that is too much.

        Raises ApiError 400 where the content type names no form.
        """
        from python_multipart.exceptions import FormParserError  # here, since few servers take uploads
        from python_multipart.multipart import MAX_BOUNDARY_LENGTH, MultipartParser, parse_options_header

        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise bad_request(
                "the body must be a form with the fields file and purpose; send Content-Type: multipart/form-data with "
                f"a boundary, not {content_type[:100]!r}"
            )
        self.path = path
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.num_bytes = 0
        self._max_file_bytes = max_file_bytes
        self._check = check
        self._parse_options = parse_options_header
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._name: str | None = None  # of the field that is being read
        self._is_file = self._has_file = self._is_complete = False
        self._value = bytearray()
        self._num_parts = 0
        self._buffer = bytearray()
        self._form_error: type[ValueError] = FormParserError
        if len(boundary) > MAX_BOUNDARY_LENGTH:
            raise bad_request(f"the form's boundary has {len(boundary)} bytes; it may have {MAX_BOUNDARY_LENGTH}")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_value,
                "on_part_data": self._take_value,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Reads all of it. Raises ApiError: 400 for what is wrong with the form, 408, 413, 507 without room."""
        try:
            async with asyncio.timeout(MAX_SECONDS):
                with await asyncio.to_thread(self.path.open, "wb") as file:
                    async for data in body:
                        self._feed(data)
                        if len(self._buffer) >= BUFFER:
                            await self._flush(file)
                    await self._flush(file)
        except TimeoutError:
            message = f"the upload was not complete within {MAX_SECONDS:g} s, {self.num_bytes} bytes of it came"
            raise ApiError(408, message, code="request_timeout") from None
        except OSError as error:
            if is_full(error):
                raise ApiError(507, "the server's disk is full; delete files, or try again later") from None
            raise
        self._check_form()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    @property
    def seconds_kept(self) -> int | None:
        """What the form says of how long the file is kept. Raises ApiError 400."""
        anchor, seconds = self.fields.get("expires_after[anchor]"), self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        return checked_expiry(anchor, int(seconds) if seconds is not None and seconds.isdecimal() else seconds)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except self._form_error as error:
            raise bad_request(f"the form cannot be read: {str(error)[:200]}") from None

    async def _flush(self, file: BinaryIO) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        if data:
            self.num_bytes += len(data)
            if self.num_bytes > self._max_file_bytes:
                raise ApiError(
                    413,
                    f"the file has {self.num_bytes} bytes or more, but batches.max_file_bytes is "
                    f"{self._max_file_bytes}; split it",
                )
            self._check(self.num_bytes)
            await asyncio.to_thread(file.write, data)

    def _check_form(self) -> None:
        if not self._is_complete:
            raise bad_request("the form ends in the middle; send all of it")
        if not self._has_file:
            raise bad_request("file is required: a part of the form with a file name", param="file")
        if not self.num_bytes:
            raise bad_request("file is empty", param="file")
        purpose = self.fields.get("purpose")
        if purpose != "batch":
            given = "is required" if purpose is None else f"is {purpose[:50]!r}"
            raise bad_request(f"purpose {given}; this server keeps files for 'batch' only", param="purpose")

    # What the parser calls

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise bad_request(f"the form has more than {MAX_FIELDS} fields; send file and purpose")
        self._disposition, self._name, self._is_file, self._value = b"", None, False, bytearray()

    def _end_header(self) -> None:
        name, value = self._header
        if name.strip().lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin_value(self) -> None:
        _, options = self._parse_options(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != "file":
            return
        if self._has_file:
            raise bad_request("the form has two files; send them one by one", param="file")
        self._is_file = self._has_file = True
        name = UNPRINTABLE.sub("", options.get(b"filename", b"").decode("utf-8", "replace"))
        self.filename = re.split(r"[/\\]", name)[-1][:MAX_NAME] or "upload.jsonl"

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._buffer += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise bad_request(f"{(self._name or '')[:50]}: a field has at most {MAX_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if not self._is_file and self._name in KNOWN_FIELDS:
            self.fields[self._name] = self._value.decode("utf-8", "replace").strip()

    def _end(self) -> None:
        self._is_complete = True


LEAST_EXPIRY, MOST_EXPIRY = 3600, 2592000  # seconds: an hour, 30 days


def checked_expiry(anchor: object, seconds: object, *, param: str = "expires_after") -> int:
    """The seconds. Raises ApiError 400."""
    if anchor != "created_at":
        raise bad_request(f"{param}: anchor must be 'created_at'", param=param)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not LEAST_EXPIRY <= seconds <= MOST_EXPIRY:
        message = f"{param}: seconds must be a whole number from {LEAST_EXPIRY} to {MOST_EXPIRY}"
        raise bad_request(message, param=param)
    return seconds
