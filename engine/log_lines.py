"""Log lines of both processes: text with key=value fields, or JSON, each with the time and its zone."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime
from typing import TextIO

from engine.config import LoggingConfig

OWN_LOGGERS = ("peregrine", "server", "engine", "kernels")
_FIELDS = re.compile(r"[a-z_]+=\S*(?: [a-z_]+=\S*)*")  # a message that is nothing else becomes fields of JSON
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


class Lines(logging.Formatter):
    """The formatter of a process. A record is one line, whatever is in it, but for the tracebacks of text."""

    def __init__(self, config: LoggingConfig) -> None:
        super().__init__()
        self._is_json = config.format == "json"

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if not self._is_json:
            line = f"time={time} level={record.levelname} logger={record.name} {message}"
            return f"{line}\n{trace}" if trace else line
        fields: dict[str, str | int | float] = {"time": time, "level": record.levelname, "logger": record.name}
        fields.update(_split(message) if _FIELDS.fullmatch(message) else {"message": message})
        if trace:
            fields["exception"] = trace
        return json.dumps(fields, ensure_ascii=False)


def _split(message: str) -> dict[str, str | int | float]:
    pairs = (field.partition("=")[::2] for field in message.split(" "))
    return {name: _value(text) for name, text in pairs}


def _value(text: str) -> str | int | float:
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    return float(text) if number[1] else int(text)


def configure_logging(config: LoggingConfig, stream: TextIO | None = None) -> None:
    """Sends the log of this process to a stream (standard error), and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _apply(config, handler)


def adjust_logging(config: LoggingConfig) -> None:
    """Changes level and format of what `configure_logging` set up; does nothing where it did not."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, Lines):
            _apply(config, handler)


def _apply(config: LoggingConfig, handler: logging.Handler) -> None:
    """The level is that of our own loggers: libraries write megabytes at debug, and their warnings always matter."""
    handler.setFormatter(Lines(config))
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(config.level.upper())
