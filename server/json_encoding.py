"""The encoder of large JSON answers, in parts.

One call of the encoder holds the interpreter's lock: half a second for the log-probabilities of a long prompt. Long
lists and each choice are therefore encoded by themselves: when this runs in a thread, the event loop takes the lock
between two of them.
"""

from __future__ import annotations

import msgspec

_PIECE = 2048  # items of a list that are encoded at once: some milliseconds if each has twenty alternatives
_encode = msgspec.json.Encoder().encode


def encode_json(message: msgspec.Struct) -> bytes:
    """The message in JSON. It must not be used afterwards: its lists are replaced by their encoding."""
    _encode_lists(message)
    return _encode(message)


def _encode_lists(message: msgspec.Struct) -> None:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, msgspec.Struct):
            _encode_lists(value)
        elif isinstance(value, list) and len(value) > _PIECE:
            pieces = (_encode(value[start : start + _PIECE])[1:-1] for start in range(0, len(value), _PIECE))
            setattr(message, name, msgspec.Raw(b"[" + b",".join(pieces) + b"]"))
        elif isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
            setattr(message, name, [msgspec.Raw(encode_json(item)) for item in value])
