"""`peregrine serve`: runs the application until a signal or a failure ends it, and ends it well."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import resource
import socket
import sys
from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Literal, cast

import uvicorn
from fastapi import FastAPI

from engine.client.client import EngineClient
from engine.ipc.messages import EXIT_CODES
from engine.log_lines import configure_logging
from server.app import MakeEngine, create_app
from server.cli.shutdown import catch_signals, drain, first_of
from server.complain import complain
from server.config import Config
from server.http.http_protocol import HttpProtocol
from server.http.intake import Intake
from server.http.key_file import KeyFileError
from server.offline.batch_folder import BatchFolderError
from server.settings import LoadedConfig
from server.state import ServerState
from server.telemetry.console import Console, process_begun_at
from server.telemetry.tracing import TracingError

logger = logging.getLogger("peregrine.server")

OWN_FILES = 128  # descriptors of the server that are no connections, with some to spare
LAST_BYTES = 5  # seconds that answers get to be written after all of them have ended


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, since `serve` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(loaded: LoadedConfig, *, make_engine: MakeEngine = EngineClient) -> int:
    """Serves until told to stop. The exit code: 0, or that of what made it end."""
    config = loaded.config
    configure_logging(config.logging)
    logging.getLogger("peregrine.access").disabled = not config.access.log
    console = Console(config, sys.stdout, begun_at=process_begun_at())
    try:
        listener = listen(config.server.host, config.server.port)
    except OSError as error:
        complain(explain_bind(error, config.server.host, config.server.port))
        return EXIT_CODES["config"]
    host, port = listener.getsockname()[:2]
    url = f"http://{_connectable(host)}:{port}"
    console.timed("listen", f"{url} (GET /readyz tells when the model is ready)")
    try:
        app = create_app(config, sources=loaded.sources, observers=[console], make_engine=make_engine)
    except (KeyFileError, BatchFolderError, TracingError) as error:
        complain(f"config: {error}")
        return EXIT_CODES["config"]
    state: ServerState = app.state.server
    if state.keys.is_empty and not _is_loopback(host):
        logger.warning("anybody who reaches %s may use the model: no server.api_keys are set", url)
    server = make_http_server(app, config)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_run(state, server, listener, console, url))
    if state.failure is None:
        console.say("stopped")
        return 0
    complain(f"{state.failure.kind}: {state.failure.message}")
    return EXIT_CODES[state.failure.kind]


def make_http_server(app: FastAPI, config: Config, *, lifespan: Literal["on", "off"] = "on") -> HttpServer:
    """uvicorn with our bounds on what comes before a request is authorised."""
    operation = config.operation
    max_connections = _usable_connections(operation.max_connections)
    intake = Intake(max_connections=max_connections, max_held_bytes=operation.max_total_head_bytes)
    protocol = partial(HttpProtocol, settings=config, intake=intake)
    return HttpServer(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], protocol),  # uvicorn only calls it
            ws="none",
            lifespan=lifespan,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `create_app` adds them for those that are trusted
            timeout_keep_alive=ceil(operation.keep_alive_timeout),
            timeout_graceful_shutdown=LAST_BYTES,
        )
    )


def _usable_connections(max_connections: int) -> int:
    """The number of connections that the process may have open, beside its own files. Raises `ulimit -n` if it may."""
    wanted = max_connections + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    usable = max(soft - OWN_FILES, soft // 2)
    logger.warning("ulimit -n is %d: %d connections are kept open, not operation.max_connections", soft, usable)
    return usable


async def _run(state: ServerState, server: HttpServer, listener: socket.socket, console: Console, url: str) -> None:
    ending = catch_signals(console, state.key_file)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    announcing = asyncio.create_task(_announce(state, console, url))
    await first_of(ending.asked.wait(), state.failed.wait(), asyncio.shield(serving))
    announcing.cancel()
    await drain(state, server.server_state.tasks, ending, console)
    await state.engine.stop()  # requests that are left get their terminal event from this
    server.should_exit = True
    await serving


async def _announce(state: ServerState, console: Console, url: str) -> None:
    await state.first_ready.wait()
    gc.collect()
    gc.freeze()  # what was imported stays: to look through it for garbage stops every stream for a tenth of a second
    if state.engine.model is not None:
        console.banner(state.engine.model, url)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow is begun. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def explain_bind(error: OSError, host: str, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return f"config: server.host {host!r} is not an address of this machine; use --host 127.0.0.1 or --host 0.0.0.0"
    reasons = {
        errno.EADDRINUSE: f"port {port} on {host} is in use; stop what uses it, or choose another with --port",
        errno.EACCES: f"port {port} needs more rights than this user has; choose one above 1023 with --port",
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine; use --host 127.0.0.1 or --host 0.0.0.0",
    }
    reason = reasons.get(error.errno or 0, f"cannot listen on {host} port {port}: {error.strerror}")
    return f"config: {reason}"


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _connectable(host: str) -> str:
    """The address for a browser on this machine, also where the server listens on all addresses (0.0.0.0, ::)."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host
