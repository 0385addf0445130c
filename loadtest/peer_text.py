"""`NAME=URL[,key=value...]`: how a server under comparison is written on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import msgspec

from loadtest.client import JsonValue

KEYS = ("model", "api", "prompts", "ignore_eos", "extra", "api_key", "done", "pid", "version", "precision")


@dataclass(frozen=True)
class PeerText:
    """A peer as it was written: what `options` does not have is taken from the command's own options."""

    name: str
    url: str
    options: dict[str, str] = field(default_factory=dict)


def parse_peer(text: str) -> PeerText:
    """Values end at a comma, except JSON objects, which end where they end. ValueError says what is wrong."""
    name, separator, rest = text.partition("=")
    url, _, rest = rest.partition(",")
    if not (name and separator and url.startswith(("http://", "https://"))):
        raise ValueError(
            f"{text!r} is no peer: write NAME=URL[,key=value...], as in ours=http://127.0.0.1:8000,model=m"
        )
    options: dict[str, str] = {}
    while rest:
        key, separator, rest = rest.partition("=")
        if key not in KEYS or not separator:
            raise ValueError(f"peer {name}: {key!r} is no option; there are {', '.join(KEYS)}")
        length = _json_length(rest) if rest.startswith("{") else (rest + ",").index(",")
        options[key], rest = rest[:length], rest[length:].removeprefix(",")
    return PeerText(name, url, options)


def parse_extra_body(text: str) -> dict[str, JsonValue]:
    """A JSON object. Raises ValueError otherwise."""
    try:
        body: dict[str, JsonValue] = msgspec.json.decode(text, type=dict)
    except msgspec.DecodeError as error:
        raise ValueError(f"the extra body must be a JSON object, not {text!r}: {error}") from error
    return body


def _json_length(text: str) -> int:
    """Length of the JSON object that `text` begins with."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} does not begin with a JSON object: {error}") from error
    return end
