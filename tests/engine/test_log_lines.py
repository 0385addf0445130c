"""Log lines: one for each record, with the time's zone, for people or for programs."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from engine.config import LoggingConfig
from engine.log_lines import Lines, adjust_logging
from tests import ROOT


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO, logging.StreamHandler]]:
    """A logger with a handler of its own: pytest owns the root's."""
    logger, stream = logging.getLogger("engine.test_log_lines"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield logger, stream, handler
    logger.removeHandler(handler)
    logger.propagate = True


def test_a_line_has_its_time_with_the_zone(log) -> None:
    logger, stream, handler = log
    handler.setFormatter(Lines(LoggingConfig()))
    logger.warning("the %s is full", "disk")
    words = stream.getvalue().rstrip("\n").split(" ", 3)
    assert datetime.fromisoformat(words[0].removeprefix("time=")).tzinfo is not None
    assert words[1:] == ["level=WARNING", "logger=engine.test_log_lines", "the disk is full"]


def test_json_has_messages_as_they_are_and_fields_as_fields(log) -> None:
    logger, stream, handler = log
    handler.setFormatter(Lines(LoggingConfig(format="json")))
    logger.info('a "quoted"\nmessage with a=b in it')
    logger.info("id=%s status=%s seconds=%.3f path=%s empty=", "x-1", 200, 0.25, "/a?b=c")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == 'a "quoted"\nmessage with a=b in it'
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (first["level"], first["logger"]) == ("INFO", "engine.test_log_lines")
    fields = {name: second[name] for name in ("id", "status", "seconds", "path", "empty")}
    assert fields == {"id": "x-1", "status": 200, "seconds": 0.25, "path": "/a?b=c", "empty": ""}
    assert "message" not in second


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_traceback_comes_with_its_line(log, format: str) -> None:
    logger, stream, handler = log
    handler.setFormatter(Lines(LoggingConfig(format=format)))
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("it failed")
    if format == "json":
        [line] = stream.getvalue().splitlines()
        assert json.loads(line)["message"] == "it failed"
        assert "KeyError: 'gone'" in json.loads(line)["exception"]
    else:
        assert stream.getvalue().endswith("KeyError: 'gone'\n")


def test_handlers_of_others_are_left_alone(log) -> None:
    before = [handler.formatter for handler in logging.getLogger().handlers]
    adjust_logging(LoggingConfig(level="error", format="json"))
    assert [handler.formatter for handler in logging.getLogger().handlers] == before
    assert logging.getLogger("engine").level == logging.NOTSET


LOGGING = """
import logging
from engine.config import LoggingConfig
from engine.log_lines import adjust_logging, configure_logging
configure_logging(LoggingConfig())
adjust_logging(LoggingConfig(level={level!r}))
for name in ("engine.a", "numba.core"):
    for word in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), word)(word)
"""


@pytest.mark.parametrize(
    ("level", "own"),
    [("debug", ["debug", "info", "warning", "error"]), ("info", ["info", "warning", "error"]), ("error", ["error"])],
)
def test_the_level_is_that_of_our_own_lines(level: str, own: list[str]) -> None:
    """Libraries warn as ever, and say no more than that."""
    result = subprocess.run(
        [sys.executable, "-c", LOGGING.format(level=level)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split(" ") for line in result.stderr.splitlines()]
    assert [line[-1] for line in lines if line[2] == "logger=engine.a"] == own
    assert [line[-1] for line in lines if line[2] == "logger=numba.core"] == ["warning", "error"]
