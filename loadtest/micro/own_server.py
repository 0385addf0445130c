"""A Peregrine of this checkout in processes of its own, for measurements that need the whole of it."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.client.client import Target
from loadtest.compare.launch import LaunchedServer, free_ports
from loadtest.workload.prompts import Exchange

PATIENCE = 300.0  # seconds until the first answer
LOWEST_ID, HIGHEST_ID = 10, 255  # of prompts of ids that every vocabulary has, and that are no special tokens


@contextmanager
def own_server(arguments: list[str], *, patience: float = PATIENCE) -> Iterator[str]:
    """The URL of a server that has answered. It ends with the block. RuntimeError with its last words if it never does.

    arguments: of `peregrine serve`
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "server.cli", "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    server = LaunchedServer("the server", f"exec {shlex.join(command)}")
    try:
        asyncio.run(server.wait_until_ready(Target(url), Exchange([LOWEST_ID] * 4, 1), patience=patience))
        yield url
    finally:
        asyncio.run(server.stop())
