"""Keeps the inputs of the step that runs in a file, for when it ends the process. Off unless somebody asks for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from engine.batch.step_file import StepFile, without_contents
from engine.config import EngineConfig
from engine.ipc.state_directory import keep_running_step, running_step_file
from engine.runner.step_builder import StepBuilder
from engine.types import Scheduled

logger = logging.getLogger(__name__)


class StepRecording:
    """Writes a file before each step and removes it after: what is left is the step that never ended.

    The inputs are complete in themselves: block tables and token counts are told as to an executor that has none. A
    file that cannot be written or removed costs the recording, never a step.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config_json = config.model_dump_json()
        self._has_contents = config.supervision.record_steps == "contents"
        self._path: Path | None = running_step_file()

    def begin(self, batch: list[Scheduled], builder: StepBuilder) -> None:
        """builder: the one that the step's own inputs are made by"""
        if self._path is None:
            return
        inputs = builder.fresh().build(batch)
        if not self._has_contents:
            inputs = without_contents(inputs)
        try:
            StepFile(config_json=self._config_json, has_contents=self._has_contents, inputs=inputs).write(self._path)
        except OSError as error:
            self._stop(error)

    def end(self) -> None:
        """The step is over."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._stop(error)

    def keep(self) -> None:
        """The step raised an error, but the process goes on."""
        kept = keep_running_step(os.getpid())
        if kept is not None:
            logger.error("the step that failed is recorded: python -m engine.replay %s", kept)

    def _stop(self, error: OSError) -> None:
        logger.warning("steps are not recorded any more: %s", error)
        self._path = None
