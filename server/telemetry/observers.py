"""Observers of the engine: one that passes events on to several, and one that ignores them."""

from __future__ import annotations

import logging

from engine.client.client import EngineObserver
from engine.ipc.messages import ModelInfo
from engine.types import StepStats

logger = logging.getLogger("peregrine.server")


class Observers(EngineObserver):
    """Passes each event on to several observers, in order."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = list(observers)

    def add(self, observer: EngineObserver) -> None:
        self._observers.append(observer)

    def on_phase(self, name: str, detail: str) -> None:
        for observer in self._observers:
            observer.on_phase(name, detail)

    def on_ready(self, model: ModelInfo) -> None:
        for observer in self._observers:
            observer.on_ready(model)

    def on_step(self, stats: StepStats) -> None:
        for observer in self._observers:
            observer.on_step(stats)

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        for observer in self._observers:
            observer.on_started(request_id, waited_seconds)

    def on_death(self, reason: str) -> None:
        for observer in self._observers:
            observer.on_death(reason)

    def on_replay(self, num_requests: int) -> None:
        for observer in self._observers:
            observer.on_replay(num_requests)


class NullObserver(EngineObserver):
    """Ignores every event: the base of observers that need only some."""

    def on_phase(self, name: str, detail: str) -> None:
        """Nothing."""

    def on_ready(self, model: ModelInfo) -> None:
        """Nothing."""

    def on_step(self, stats: StepStats) -> None:
        """Nothing."""

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        """Nothing."""

    def on_death(self, reason: str) -> None:
        """Nothing."""

    def on_replay(self, num_requests: int) -> None:
        """Nothing."""
