"""What a command measured, as it is kept in a JSON file. Report, plot and table are made from this alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtest.environment import Environment
from loadtest.statistics import Figures


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    model: str
    version: str | None
    api: str
    extra_body: str


@dataclass(frozen=True)
class Scenario:
    """One load, the same for every server. Lengths and arrivals as they are written on the command line."""

    name: str
    prompt_length: str
    output_length: str
    concurrency: int | None
    rate: float | None
    num_requests: int | None
    duration: float | None
    num_shared_tokens: int = 0
    shared_fraction: float = 0.0

    @property
    def load(self) -> str:
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Measurement:
    """One run of one scenario against one server.

    busy_cores: what else ran on the machine just before and after, in cores, the larger of the two; None: not looked at
    is_disturbed: that was more than allowed; such a run is kept, but medians leave it out where they can
    memory: bytes of the server's processes after the run (proportional set size), if its process id is known
    client_seconds_per_event: processor time that this process spent on each event of the streams
    client_load: processor time that this process spent per second
    """

    server: str
    scenario: str
    round: int
    figures: Figures
    busy_cores: float | None
    is_disturbed: bool
    memory: int | None
    client_seconds_per_event: float | None
    client_load: float
    failure_examples: dict[str, str]


@dataclass(frozen=True)
class Session:
    kind: str
    command: str
    seed: int
    environment: Environment
    servers: list[Server]
    scenarios: list[Scenario]
    measurements: list[Measurement]

    def of(self, scenario: str, server: str) -> list[Measurement]:
        """The rounds of one scenario and server; without the disturbed ones unless all were."""
        rounds = [m for m in self.measurements if (m.scenario, m.server) == (scenario, server)]
        return [m for m in rounds if not m.is_disturbed] or rounds


def save(session: Session, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(session), indent=1) + b"\n")


def load(path: Path) -> Session:
    """Raises ValueError if the file is no session."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Session)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no result of this load generator: {error}") from error
