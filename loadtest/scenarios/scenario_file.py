"""The YAML file of a scenario: its schema, and how it is read. All that is wrong with a file is said, by place."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from loadtest.report.slo import ServiceLevel, parse_service_level
from loadtest.workload.arrivals import Arrivals, ClosedLoop, Phase, PhasedArrivals
from loadtest.workload.lengths import MAX_TOKENS, Length, parse_length

MAX_FILE_BYTES = 1 << 20
MAX_ARRIVALS = 1_000_000  # of one run, on average: they are all kept until its end
FOLDER = Path(__file__).parent


def _length(value: object) -> object:
    """As on the command line: 128, uniform:64:256, lognormal:128:0.5."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no length: 128, uniform:64:256 or lognormal:128:0.5[:1024] are")
    return parse_length(str(value))


def _shape(value: object) -> str:
    """Which of two forms a value has, so that what is wrong with it is said of that form alone."""
    return "list" if isinstance(value, list) else "number"


def _shape_of_arrivals(value: object) -> str:
    return "mapping" if isinstance(value, dict) else "list"


Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)]
LengthField = Annotated[Length, BeforeValidator(_length)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w .-]+$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, str_strip_whitespace=True, strict=True
    )


class SharedPrefix(_Part):
    """What prompts begin with alike. groups: so many different ones, of which each conversation has one by chance"""

    tokens: Tokens
    groups: Annotated[int, Field(ge=1, le=100_000)] = 1


class Traffic(_Part):
    """Requests of one kind. weight: their share of the arrivals, beside the other kinds' weights

    turns: of a conversation; each sends all that was said before, and comes `think_seconds` after the answer to the one
    before it, on average: the times are exponential. prompt: tokens that a turn adds; output: of an answer
    """

    name: Name
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    prompt: LengthField
    output: LengthField
    shared_prefix: SharedPrefix | None = None
    turns: LengthField = Field(default_factory=lambda: parse_length("1"))
    think_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 0.0
    tenant: str | None = None


class Tenant(_Part):
    """key_env: the environment variable that holds its API key, so that no key stands in a file"""

    key_env: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class PhaseSpec(_Part):
    """A part of the arrivals. rate: requests per second, or [from, to]; burst: so many at once, `every` so often"""

    seconds: Seconds
    rate: Annotated[
        Annotated[Rate, Tag("number")] | Annotated[list[Rate], Field(min_length=2, max_length=2), Tag("list")],
        Discriminator(_shape),
    ] = 0.0
    burst: Annotated[int, Field(ge=1, le=100_000)] | None = None
    every: Seconds | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every is not None and self.burst is None:
            raise ValueError("every says how often a burst comes; give burst, the number of requests, as well")
        return self

    @property
    def phase(self) -> Phase:
        first, last = self.rate if isinstance(self.rate, list) else (self.rate, self.rate)
        every = float("inf") if self.every is None else self.every
        return Phase(self.seconds, first, last, self.burst or 0, every)


class ClosedArrivals(_Part):
    """Clients that each send again when they have their answer. requests, seconds: until one of them is reached"""

    concurrency: Annotated[int, Field(ge=1, le=10_000)]
    requests: Annotated[int, Field(ge=1)] | None = None
    seconds: Seconds | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.requests is None and self.seconds is None:
            raise ValueError("the run would never end; give requests, seconds, or both")
        return self


class Scenario(_Part):
    """A scenario, as its file has it. slo: limits as of --slo, by name"""

    description: str = ""
    api: Literal["chat", "completions"] = "chat"
    arrivals: Annotated[
        Annotated[ClosedArrivals, Tag("mapping")] | Annotated[list[PhaseSpec], Field(min_length=1), Tag("list")],
        Discriminator(_shape_of_arrivals),
    ]
    traffic: Annotated[list[Traffic], Field(min_length=1)]
    tenants: dict[Name, Tenant] = {}
    slo: dict[Literal["ttft", "tpot", "itl", "e2e"], str | float] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [traffic.name for traffic in self.traffic]
        if len(set(names)) < len(names):
            raise ValueError(f"two kinds of traffic have the same name ({', '.join(names)}); give each its own")
        for traffic in self.traffic:
            if traffic.tenant is not None and traffic.tenant not in self.tenants:
                known = ", ".join(self.tenants) or "none"
                raise ValueError(f"{traffic.name} is of tenant {traffic.tenant}, which tenants lacks; it has {known}")
            if self.api == "completions" and str(traffic.turns) != "1":
                raise ValueError(f"{traffic.name} has turns, which are messages of a chat; set api to chat")
        assert self.service_level is None or self.slo  # which it raises for, if a limit is no time
        if isinstance(self.arrivals, list):
            expected = sum(spec.phase.expected for spec in self.arrivals)
            if expected > MAX_ARRIVALS:
                raise ValueError(f"{expected:,.0f} requests would come, of {MAX_ARRIVALS:,} at most; lower the rates")
            if not expected and not any(spec.burst for spec in self.arrivals):
                raise ValueError("nothing would ever come; give a phase of arrivals a rate or a burst")
        return self

    @property
    def service_level(self) -> ServiceLevel | None:
        if not self.slo:
            return None
        return parse_service_level(",".join(f"{name}={value}" for name, value in self.slo.items()))

    def times(self, *, rate_factor: float = 1.0) -> Arrivals:
        """When requests come, at so many times the rates of the file."""
        if isinstance(self.arrivals, ClosedArrivals):
            return ClosedLoop(self.arrivals.concurrency)
        return PhasedArrivals([spec.phase for spec in self.arrivals]).scaled(rate_factor)

    def keys(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The API key of each tenant. ValueError for a variable that is not set."""
        missing = [tenant.key_env for tenant in self.tenants.values() if not environment.get(tenant.key_env)]
        if missing:
            raise ValueError(
                f"the environment lacks {', '.join(missing)}, where the scenario's tenants have their keys"
            )
        return {name: environment[tenant.key_env] for name, tenant in self.tenants.items()}


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys, of which one would silently win, and without aliases, which can multiply a file."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def find_scenario(name: str) -> Path:
    """The file of that name, or the scenario of that name that comes with the load generator. ValueError: no such."""
    path = Path(name)
    own = FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    if path.name == name and own.is_file():
        return own
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
    raise ValueError(f"{name} is no file, and no scenario that comes with this one: {known}")


def load_scenario(path: Path) -> Scenario:
    """Reads a scenario. ValueError with all that is wrong with it, a line each."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a scenario has {MAX_FILE_BYTES:,} at most")
    try:
        content = yaml.load(path.read_text(), Loader=_StrictLoader)
        return Scenario.model_validate(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{path}{place}: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a scenario") from error
    except ValidationError as error:
        lines = dict.fromkeys(_line(each) for each in error.errors())
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from error


def _line(error: ErrorDetails) -> str:
    """An error with its place, without the names of the two forms that some values may have."""
    parts = [str(part) for part in error["loc"] if part not in ("mapping", "list", "number")]
    place = ".".join(parts) or "the scenario"
    value = error["input"]
    given = f", not {value!r:.60}" if isinstance(value, bool | int | float | str) else ""
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: there is no such key"
        case "value_error":
            return f"{place}: {error['msg'].removeprefix('Value error, ')}"
        case "model_type":
            return f"{place}: must be a mapping of names to values{given}"
        case "missing":
            return f"{place}: is missing"
    return f"{place}: {error['msg']}{given}"
