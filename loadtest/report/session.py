"""What a command measured, as it is kept in a JSON file. Report, plot and table are made from this alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loadtest.client.draft_counters import DraftCounters
from loadtest.report.environment import Environment
from loadtest.report.result_files import load_result
from loadtest.report.statistics import Figures

REPEAT_STREAMS = 1 << 16  # between the streams of prompts of a run and of its repetition


@dataclass(frozen=True)
class Server:
    """precision: how its weights are kept, in words, where that was said: servers with equal words are compared too
    command: what started it, if the comparison did; environment variables are as they were written
    start_seconds: each time from the command to the end of its first answer
    speculation: how a server of ours speculates, as JSON (`--speculative-config`); empty: nothing is known of it"""

    name: str
    url: str
    model: str
    version: str | None
    api: str
    extra_body: str
    precision: str = ""
    command: str = ""
    start_seconds: list[float] = field(default_factory=list)
    speculation: str = ""


@dataclass(frozen=True)
class Scenario:
    """One load, the same for every server. Lengths and arrivals as they are written on the command line.

    workload: what the prompts say, where they are written for a purpose; they are as long as that makes them
    arrivals: when requests come, in words, where that is neither one rate nor a number of clients
    """

    name: str
    prompt_length: str
    output_length: str
    concurrency: int | None
    rate: float | None
    num_requests: int | None
    duration: float | None
    num_shared_tokens: int = 0
    shared_fraction: float = 0.0
    workload: str = ""
    arrivals: str = ""

    @property
    def decodes(self) -> bool:
        """Answers of one token measure prefill alone."""
        return self.output_length != "1"

    @property
    def load(self) -> str:
        if self.arrivals:
            return self.arrivals
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Sample:
    """One request of a run, for the plots over time. at: seconds from the run's start at which it was due

    kind: of its traffic, where there are several; turn: of its conversation; error: why it failed, and then all seconds
    but `end_to_end` are 0
    """

    at: float
    time_to_first_token: float
    time_per_output_token: float
    longest_gap: float
    end_to_end: float
    num_prompt_tokens: int
    num_output_tokens: int
    kind: str = ""
    turn: int = 0
    error: str = ""


@dataclass(frozen=True)
class Probe:
    """One run of a search for the highest rate. is_good: every limit was kept; reason: which was not, in words

    is_cut: the run was ended early, since it could not become good any more
    values: what was measured of each limit, in seconds, by its name; of a run that was cut, so far
    """

    rate: float
    is_good: bool
    reason: str
    is_cut: bool
    values: dict[str, float]
    num_answers: int
    num_failures: int


@dataclass(frozen=True)
class Search:
    """A search for the highest rate at which the limits are kept, in requests per second.

    best: the rate that was confirmed; None: none was. limits: in seconds, by name, which this percentile of all
    requests' values, or of all tokens' for itl, has to keep. stopped_by: why it ended, in words
    """

    best: float | None
    limits: dict[str, float]
    percentile: int
    precision: float
    num_confirmations: int
    probes: list[Probe]
    stopped_by: str


@dataclass(frozen=True)
class Measurement:
    """One run of one scenario against one server.

    busy_cores: what else ran on the machine just before and after, in cores, the larger of the two; None: not looked at
    is_disturbed: that was more than allowed; such a run is kept, but medians leave it out where they can
    memory: bytes that all of the server's processes held after the run, each page once, if its process id is known
    resident_memory: the same with shared pages counted once for each process (resident set size)
    client_seconds_per_event: processor time that this process spent on each event of the streams
    client_load: processor time that this process spent per second
    drafts: what the server counted of speculative decoding, in the warm-up as well; None where it counts nothing
    kinds: the figures of each kind of traffic, where there are several; samples: of each request, where they are kept
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
    resident_memory: int | None = None
    drafts: DraftCounters | None = None
    kinds: dict[str, Figures] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """The number of the round. `round` names the prompts: a run that was disturbed is repeated with others."""
        return self.round % REPEAT_STREAMS


@dataclass(frozen=True)
class Session:
    """ours: names of the servers whose best is compared with the best of the others; empty: the first one's
    error: what ended the session before all was measured; empty: nothing did
    service_level: the limits in seconds, by name; search: what a search for the highest rate found
    num_compared: answers whose text was compared with another server's; differences: where those were not the same
    """

    kind: str
    command: str
    seed: int
    environment: Environment
    servers: list[Server]
    scenarios: list[Scenario]
    measurements: list[Measurement]
    ours: list[str] = field(default_factory=list)
    error: str = ""
    num_compared: int = 0
    differences: list[str] = field(default_factory=list)
    service_level: dict[str, float] = field(default_factory=dict)
    search: Search | None = None

    def of(self, scenario: str, server: str) -> list[Measurement]:
        """The rounds of one scenario and server; without the disturbed ones unless all were."""
        rounds = [m for m in self.measurements if (m.scenario, m.server) == (scenario, server)]
        return [m for m in rounds if not m.is_disturbed] or rounds


def load(path: Path) -> Session:
    """Raises ValueError if the file is no session."""
    return load_result(path, Session, origin="this load generator")
