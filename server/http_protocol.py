"""uvicorn's HTTP/1.1, with a bound on what comes before a body, and our error body for what is no HTTP."""

from __future__ import annotations

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError, error_body, error_headers

MAX_HEAD_BYTES = 65536  # request line and headers; the parser has no bound of its own, and nobody is authorised yet


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _is_in_head = False
    _num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_in_head:
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"the request line and headers have more than {MAX_HEAD_BYTES} bytes; send less"
            self._refuse(ApiError(431, message), b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"this is not HTTP/1.1: {msg}", code="invalid_http"), b"400 Bad Request")

    def _refuse(self, error: ApiError, status_line: bytes) -> None:
        """Without the application, which never learns of this request."""
        body = msgspec.json.encode(error_body(error))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(error),
        }
        head = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        self.transport.write(b"HTTP/1.1 " + status_line + b"\r\n" + head + b"\r\n" + body)
        self.transport.close()
