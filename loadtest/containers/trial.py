"""What is tried with the image: starts, what it may not do, and ends."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from loadtest.compare.launch import free_ports
from loadtest.containers.building import TAG, command, mounts

START_PATIENCE = 600.0  # seconds; the model is fetched and kernels are compiled
MAX_BYTES = 1_500_000_000
MAX_PROCESSES = 10_000  # of a user: what runc may set where it may not set more
PLACES = ("/", "/etc", "/opt/peregrine", "/opt/peregrine/configs", "/var/tmp", "/home")
TOOLS = ("gcc", "cc", "g++", "make", "git")
# systemd would run the health check; it is run by hand below
LOCKED = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
]


@dataclass(frozen=True)
class Inside:
    """What a container may do and has. user: of the server; capabilities: that are in effect, in hexadecimal; writable:
    places outside of /cache and /tmp that could be written; tools: of those that build, which nobody needs any more"""

    user: str
    capabilities: str
    writable: list[str]
    tools: list[str]
    is_healthy: bool
    answer: str


@dataclass(frozen=True)
class Trial:
    """Times in seconds. first_start: with an empty volume, from `podman run` to /readyz; second_start: with that volume
    two_starts: of two containers that share an empty volume, until both are ready
    early_stop: from SIGTERM right after `podman run` to the end; stop: the same of a server that was ready
    """

    first_start: float
    second_start: float
    two_starts: float
    early_stop: float
    early_exit_code: int
    stop: float
    exit_code: int
    inside: Inside

    def faults(self, num_bytes: int) -> list[str]:
        """What is not as it should be."""
        inside = self.inside
        checks = {
            f"the image has {num_bytes} bytes, more than {MAX_BYTES}": num_bytes > MAX_BYTES,
            f"it runs as user {inside.user}": inside.user != "10001",
            f"it has capabilities {inside.capabilities}": int(inside.capabilities, 16) != 0,
            f"it can write {', '.join(inside.writable)}": bool(inside.writable),
            f"it has {', '.join(inside.tools)}": bool(inside.tools),
            "its health check fails": not inside.is_healthy,
            "it answered nothing": not inside.answer,
            f"told to end early it ended with code {self.early_exit_code}": self.early_exit_code not in (0, 143),
            f"it ended with code {self.exit_code}": self.exit_code != 0,
        }
        return [fault for fault, is_so in checks.items() if is_so]


class Container:
    """A container of the image on the host's network. Removed when it is left, with its volume if it is its own."""

    def __init__(self, name: str, volume: str, packages: Mapping[str, str], *arguments: str) -> None:
        self.name = name
        self._port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self._port}"
        self.begun = time.monotonic()
        place = ["--no-healthcheck", "--network", "host", *_limits(), "--volume", f"{volume}:/cache"]
        served = ["serve", "--host", "127.0.0.1", "--port", str(self._port), "--drain-delay", "1", *arguments]
        command(["podman", "run", "--detach", "--name", name, *LOCKED, *mounts(packages), *place, TAG, *served])

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            command(["podman", "rm", "--force", "--time", "0", self.name], patience=60)

    def wait_until_ready(self) -> float:
        """Seconds since it was started. Raises RuntimeError, with its log, where it does not get ready."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/readyz", timeout=5).status_code == 200:
                    return time.monotonic() - self.begun
            if time.monotonic() - self.begun > START_PATIENCE or not self._runs():
                raise RuntimeError(f"{self.name} is not ready:\n{self.log()[-3000:]}")
            time.sleep(0.1)

    def run(self, *words: str) -> str:
        return command(["podman", "exec", self.name, *words])

    def succeeds(self, *words: str) -> bool:
        try:
            self.run(*words)
        except RuntimeError:
            return False
        return True

    def end(self) -> tuple[float, int]:
        """Seconds from SIGTERM to its end, and its exit code."""
        begun = time.monotonic()
        command(["podman", "kill", "--signal", "TERM", self.name])
        code = int(command(["podman", "wait", self.name], patience=120))
        return time.monotonic() - begun, code

    def log(self) -> str:
        return command(["podman", "logs", self.name])

    def _runs(self) -> bool:
        return command(["podman", "inspect", "--format", "{{.State.Running}}", self.name]) == "true"


def try_image(packages: Mapping[str, str]) -> Trial:
    """Runs the image. Its containers and volumes are gone afterwards. Raises RuntimeError where one does not start."""
    volumes = ["peregrine-image-test", "peregrine-image-test-shared"]
    _remove(volumes)
    try:
        with Container("peregrine-first", volumes[0], packages) as first:
            first_start = first.wait_until_ready()
            inside = _look_into(first)
            stop, exit_code = first.end()
        with Container("peregrine-second", volumes[0], packages) as second:
            second_start = second.wait_until_ready()
        with Container("peregrine-early", volumes[0], packages) as early:
            early_stop, early_code = early.end()
        with (
            Container("peregrine-left", volumes[1], packages) as left,
            Container("peregrine-right", volumes[1], packages) as right,
        ):
            two_starts = max(left.wait_until_ready(), right.wait_until_ready())
    finally:
        _remove(volumes)
    return Trial(
        first_start=round(first_start, 2),
        second_start=round(second_start, 2),
        two_starts=round(two_starts, 2),
        early_stop=round(early_stop, 2),
        early_exit_code=early_code,
        stop=round(stop, 2),
        exit_code=exit_code,
        inside=inside,
    )


def _limits() -> list[str]:
    """This process's own limits: podman would set others, which takes a right that root does not have everywhere."""
    names = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    hard = {name: resource.getrlimit(kind)[1] for name, kind in names.items()}
    hard["nproc"] = MAX_PROCESSES if hard["nproc"] == resource.RLIM_INFINITY else min(hard["nproc"], MAX_PROCESSES)
    return [
        word
        for name, limit in hard.items()
        if limit != resource.RLIM_INFINITY
        for word in ("--ulimit", f"{name}={limit}:{limit}")
    ]


def _look_into(container: Container) -> Inside:
    fields = dict(line.split(":", 1) for line in container.run("cat", "/proc/1/status").splitlines())
    body = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(container.url + "/v1/completions", json=body, timeout=120).json()
    return Inside(
        user=fields["Uid"].split()[1],
        capabilities=fields["CapEff"].strip(),
        writable=[path for path in PLACES if container.succeeds("touch", f"{path}/written")],
        tools=[tool for tool in TOOLS if container.succeeds("sh", "-c", f"command -v {tool}")],
        is_healthy=container.succeeds("python3", "-m", "server.cli.health", "--ready"),
        answer=str(answer["choices"][0]["text"]),
    )


def _remove(volumes: Sequence[str]) -> None:
    for volume in volumes:
        with contextlib.suppress(RuntimeError):
            command(["podman", "volume", "rm", "--force", volume], patience=60)
