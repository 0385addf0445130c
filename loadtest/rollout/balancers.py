"""The load balancers of a rollout, each run with the configuration that is shipped in `configs/balancers`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from loadtest.compare.launch import free_ports
from loadtest.rollout.name_server import name_server
from loadtest.rollout.processes import RolloutProcess

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "balancers"
REPLICAS_NAME = "server"  # as in docker-compose.yml


class StartBalancer(Protocol):
    """The interface of a way to run a balancer in front of `addresses`, all at `port`."""

    def __call__(
        self, addresses: Sequence[str], port: int, folder: Path
    ) -> AbstractAsyncContextManager[RolloutProcess]: ...


@asynccontextmanager
async def haproxy(addresses: Sequence[str], port: int, folder: Path) -> AsyncIterator[RolloutProcess]:
    """HAProxy with its configuration as it is: the addresses come from a name server, the rest from its environment."""
    listen, stats = free_ports(2)
    async with name_server(REPLICAS_NAME, addresses) as nameserver:
        environment = {
            "PEREGRINE_LISTEN": f"127.0.0.1:{listen}",
            "PEREGRINE_REPLICAS": REPLICAS_NAME,
            "PEREGRINE_PORT": str(port),
            "PEREGRINE_DNS": nameserver,
            "PEREGRINE_STATS": f"127.0.0.1:{stats}",
            "PEREGRINE_ADMIN": str(folder / "admin.sock"),
        }
        command = [program("haproxy"), "-f", str(CONFIGS / "haproxy.cfg"), "-db"]
        async with _running("haproxy", command, listen, folder, environment) as process:
            yield process


@asynccontextmanager
async def nginx(addresses: Sequence[str], port: int, folder: Path) -> AsyncIterator[RolloutProcess]:
    """nginx with its configuration, but for the port, the folder of its temporary files and the list of replicas.

    The shipped list asks a name server, which nginx does only from version 1.27.3 on.
    """
    (listen,) = free_ports(1)
    settings = (CONFIGS / "nginx.conf").read_text()
    for shipped, own in (("listen 8000;", f"listen 127.0.0.1:{listen};"), ("/tmp/", f"{folder}/")):
        assert shipped in settings, f"nginx.conf has no {shipped!r}"
        settings = settings.replace(shipped, own)
    upstream = (CONFIGS / "nginx-upstream.conf").read_text()
    shipped_server = next(line for line in upstream.splitlines() if line.strip().startswith("server "))
    options = shipped_server.partition(" resolve ")[2]
    servers = "\n".join(f"    server {address}:{port} {options}" for address in addresses)
    (folder / "nginx.conf").write_text(settings)
    (folder / "nginx-upstream.conf").write_text(
        upstream.replace(shipped_server, servers).replace("resolver 127.0.0.11 valid=2s;", "")
    )
    command = [program("nginx"), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    async with _running("nginx", command, listen, folder, {}) as process:
        yield process


BALANCERS: dict[str, StartBalancer] = {"haproxy": haproxy, "nginx": nginx}


@asynccontextmanager
async def _running(
    name: str, command: Sequence[str], port: int, folder: Path, environment: dict[str, str]
) -> AsyncIterator[RolloutProcess]:
    url = f"http://127.0.0.1:{port}/readyz"
    process = RolloutProcess(name, command, url=url, log=folder / f"{name}.log", environment=environment)
    try:
        yield process
    finally:
        process.kill()


def program(name: str) -> str:
    """The path of a balancer. Raises ValueError where it is not installed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ValueError(f"{name} is not installed; on Debian and Ubuntu: apt install {name}")
    return found


def version_of(name: str) -> str:
    """The first line of what the balancer says of itself."""
    result = subprocess.run([program(name), "-v"], capture_output=True, text=True, check=False)
    return (result.stdout + result.stderr).partition("\n")[0].strip()
