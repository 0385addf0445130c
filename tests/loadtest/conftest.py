"""Servers that do what a script says, for as long as a test runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.scripted_server import Script, ScriptedServer


@pytest.fixture
def serve() -> Iterator[Callable[[Script], ScriptedServer]]:
    """Starts scripted servers that end with the test."""
    servers: list[ScriptedServer] = []

    def start(script: Script) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
