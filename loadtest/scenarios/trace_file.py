"""Recorded traces: when requests came, and how long they and their answers were. What they said is not in them.

CSV has a line of names first; JSON lines have an object each. Columns go by the names that public traces give them:

    Azure LLM inference traces    TIMESTAMP,ContextTokens,GeneratedTokens                       CSV, date and time
    BurstGPT                      Timestamp,Model,Request tokens,Response tokens,...            CSV, seconds
    Splitwise                     arrival_timestamp,prompt_size,token_size                      CSV, seconds
    Mooncake                      timestamp, input_length, output_length, hash_ids              JSON lines, milliseconds

`hash_ids` name the blocks of a prompt (512 tokens each in Mooncake's): equal ids are equal tokens, so that prompts
share the prefixes that they shared when they were recorded (Mooncake, arXiv 2407.00079, section 4).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import msgspec

from loadtest.workload.lengths import MAX_TOKENS

MAX_REQUESTS = 2_000_000
MAX_LINE = 4 << 20  # characters

_TIMES = ("timestamp", "arrival_timestamp", "arrived_at")
_PROMPTS = ("contexttokens", "request tokens", "prompt_size", "input_length", "prompt_tokens", "input_tokens")
_OUTPUTS = ("generatedtokens", "response tokens", "token_size", "output_length", "completion_tokens", "output_tokens")


class TraceRequest(NamedTuple):
    """at: seconds from the first request; hash_ids: of the prompt's blocks, or none"""

    at: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their times. num_left_out: lines whose prompt or answer had no token"""

    name: str
    requests: list[TraceRequest]
    num_left_out: int

    def cut(self, *, start: float, seconds: float | None, limit: int | None) -> Trace:
        """Those of a part of it: from `start` seconds on, so many seconds long, the first `limit`.

        ValueError where none are left.
        """
        end = math.inf if seconds is None else start + seconds
        kept = [request for request in self.requests if start <= request.at < end][:limit]
        if not kept:
            last = self.requests[-1].at
            raise ValueError(f"{self.name} has no request from {start:g} to {end:g} s; its last one is at {last:g} s")
        first = kept[0].at
        return Trace(self.name, [each._replace(at=each.at - first) for each in kept], self.num_left_out)


class _Line(msgspec.Struct):
    """Of a file in JSON lines; other fields are passed over. timestamp: milliseconds"""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path) -> Trace:
    """Reads a trace, by the ending of its name: .csv, or else JSON lines. ValueError names the line at fault."""
    read = _read_csv if path.suffix.lower() == ".csv" else _read_json_lines
    requests: list[TraceRequest] = []
    num_left_out = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, request in read(file, path.name):
                _check(request, f"{path.name}, line {number}")
                if request.num_prompt_tokens and request.num_output_tokens:
                    requests.append(request)
                else:
                    num_left_out += 1
                if len(requests) > MAX_REQUESTS:
                    raise ValueError(f"{path.name} has more than {MAX_REQUESTS:,} requests; cut it into parts")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text in UTF-8: {error}") from error
    if not requests:
        raise ValueError(f"{path.name} has no request with a prompt and an answer")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    return Trace(path.name, [request._replace(at=request.at - first) for request in requests], num_left_out)


def _check(request: TraceRequest, place: str) -> None:
    if not math.isfinite(request.at):
        raise ValueError(f"{place}: the time is {request.at}")
    for name, number in (("prompt", request.num_prompt_tokens), ("output", request.num_output_tokens)):
        if not 0 <= number <= MAX_TOKENS:
            raise ValueError(f"{place}: {number:,} {name} tokens; there may be 0 to {MAX_TOKENS:,}")


def _read_csv(file: TextIO, name: str) -> Iterator[tuple[int, TraceRequest]]:
    rows = csv.reader(_lines(file, name))
    try:
        header = [column.strip().lower() for column in next(rows, [])]
        columns = [_column(header, names, name) for names in (_TIMES, _PROMPTS, _OUTPUTS)]
        for row in rows:
            if row:
                place = f"{name}, line {rows.line_num}"
                if len(row) <= max(columns):
                    raise ValueError(f"{place}: {len(row)} columns, where the first line names {len(header)}")
                at, prompt, output = (row[column].strip() for column in columns)
                yield rows.line_num, TraceRequest(_time(at, place), _whole(prompt, place), _whole(output, place))
    except csv.Error as error:
        raise ValueError(f"{name}, line {rows.line_num}: {error}") from error


def _column(header: list[str], names: tuple[str, ...], file: str) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise ValueError(f"{file}: the first line has no column {' or '.join(names)}; it has {', '.join(header) or 'none'}")


def _time(text: str, place: str) -> float:
    """Seconds: a number, or a date and time, whose fraction may have more digits than Python reads."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError as error:
        raise ValueError(
            f"{place}: {text!r} is neither seconds nor a date and time (2023-11-16 18:17:03.97)"
        ) from error


def _whole(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{place}: {text!r} is no number of tokens") from error


def _read_json_lines(file: TextIO, name: str) -> Iterator[tuple[int, TraceRequest]]:
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(_lines(file, name), 1):
        if not line.strip():
            continue
        try:
            read = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        at = read.timestamp / 1000
        yield number, TraceRequest(at, read.input_length, read.output_length, tuple(read.hash_ids))


def _lines(file: TextIO, name: str) -> Iterator[str]:
    """Lines, none of which can fill the memory."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"{name}, line {number} has more than {MAX_LINE:,} characters: is it a trace?")
        yield line


def azure_lines(requests: Iterable[TraceRequest], started_at: datetime) -> Iterator[str]:
    """The lines of a file in the form of Azure's traces."""
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for request in requests:
        moment = datetime.fromtimestamp(started_at.timestamp() + request.at, tz=started_at.tzinfo)
        yield f"{moment:%Y-%m-%d %H:%M:%S.%f}0,{request.num_prompt_tokens},{request.num_output_tokens}\n"


def mooncake_lines(requests: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a file in the form of Mooncake's traces."""
    for request in requests:
        line: Mapping[str, object] = {
            "timestamp": round(request.at * 1000),
            "input_length": request.num_prompt_tokens,
            "output_length": request.num_output_tokens,
            "hash_ids": request.hash_ids,
        }
        yield msgspec.json.encode(line).decode() + "\n"
