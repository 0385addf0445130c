"""A real server in real processes, on a tiny model that is made at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.server_process import Server, run_server, save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(path)
    return path


StartServer = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture
def start_server(tiny_model: Path, tmp_path: Path) -> StartServer:
    """Starts a server of the test's own: `with start_server("--max-num-seqs", "4") as server`."""

    @contextlib.contextmanager
    def start(*options: str, ready: bool = True) -> Iterator[Server]:
        with run_server(tiny_model, tmp_path, *options) as server:
            if ready:
                server.wait_until_ready()
            yield server

    return start


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module's tests that leave it as they found it."""
    with run_server(tiny_model, tmp_path_factory.mktemp("server")) as server:
        server.wait_until_ready()
        yield server
