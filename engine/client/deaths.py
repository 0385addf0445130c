"""The deaths of the engine process: which of them count, and when the server should give up."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from engine.client.engine_process import Ending
from engine.config import SupervisionConfig
from engine.ipc.inflight_record import InflightRequest

MAX_REMEMBERED = 64  # deaths, for the crash report
FRUITLESS_FACTOR = 10  # times `max_deaths`: deaths in a row without any output that end the server for any reason


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """One death of the engine process, as the crash report has it."""

    at: float  # seconds since the epoch
    reason: str
    exit_code: int  # negative: the signal
    was_ready: bool
    was_killed_before_its_first_step: bool
    batch: list[InflightRequest]
    output_tail: list[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which requests a death is attributed to.

    has_suspect: the process had only a suspect, which is being tried. culprit_ids: requests that explain this death and
    earlier ones: they are quarantined, or were aborted before they could be tried alone.
    """

    has_suspect: bool
    culprit_ids: frozenset[str]


def describe_death(ending: Ending, *, reason: str, was_ready: bool, has_stepped: bool) -> Death:
    was_killed = ending.exit_code == -signal.SIGKILL and not ending.was_out_of_memory
    return Death(
        at=time.time(),
        reason=reason,
        exit_code=ending.exit_code,
        was_ready=was_ready,
        was_killed_before_its_first_step=was_killed and not has_stepped and not ending.batch,
        batch=ending.batch,
        output_tail=ending.output_tail,
    )


class Deaths:
    """Counts the deaths that neither a request nor a kill from outside explains.

    A death that is attributed to a request ends that request; a kill before the first step says nothing about the
    engine. Only a long series of deaths without a single output ends the server whatever the reasons are.
    """

    def __init__(self, config: SupervisionConfig) -> None:
        self.recent: deque[Death] = deque(maxlen=MAX_REMEMBERED)
        self._config = config
        self._counted: list[Death] = []
        self._num_fruitless = 0  # since a step had an output

    def note_progress(self) -> None:
        self._num_fruitless = 0

    def add(self, death: Death, verdict: Verdict) -> None:
        self.recent.append(death)
        self._num_fruitless += 1
        self._counted = [
            earlier
            for earlier in self._counted
            if death.at - earlier.at <= self._config.window
            and not any(line.request_id in verdict.culprit_ids for line in earlier.batch)
        ]
        is_explained = verdict.has_suspect or any(line.request_id in verdict.culprit_ids for line in death.batch)
        if not is_explained and not death.was_killed_before_its_first_step:
            self._counted.append(death)

    @property
    def num_counted(self) -> int:
        """The deaths that count, at the time of the last one."""
        return len(self._counted)

    def num_in_window(self, now: float) -> int:
        """Deaths within the window, including those that do not count."""
        return sum(now - death.at <= self._config.window for death in self.recent)

    def describe_excess(self) -> str | None:
        """The reason for which the server should give up; None if it should start another process."""
        max_deaths, window = self._config.max_deaths, self._config.window
        if self.num_counted >= max_deaths:
            return f"the engine process died {self.num_counted} times within {window:g} s (supervision.max_deaths)"
        if self._num_fruitless >= FRUITLESS_FACTOR * max_deaths:
            return f"the engine process died {self._num_fruitless} times in a row without computing anything"
        return None
