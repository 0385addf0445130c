"""Makes the objects that measure from the options of the command line."""

from __future__ import annotations

import argparse
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loadtest.client.client import Api, IgnoreEos, JsonValue, Target
from loadtest.compare.hosting import Launch, LaunchingHost, RestartingHost, RunningHost
from loadtest.compare.measure import Case, Peer
from loadtest.compare.runner import Plan
from loadtest.scenarios.scenario_file import ClosedArrivals, Scenario, find_scenario, load_scenario
from loadtest.scenarios.trace_file import read_trace
from loadtest.scenarios.traced import TraceWorkload, arrivals_of, with_lengths
from loadtest.scenarios.traffic import TrafficWorkload
from loadtest.workload.arrivals import Arrivals, ClosedLoop, OpenLoop
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import AnyWorkload, Exchange, Workload

PEER_KEYS = (
    "model", "api", "prompts", "ignore_eos", "extra", "api_key", "done", "pid", "version", "precision", "speculation",
)  # fmt: skip


@dataclass(frozen=True)
class PeerText:
    """`NAME=URL[,key=value...]`: what `options` does not have is taken from the command's own options."""

    name: str
    url: str
    options: dict[str, str] = field(default_factory=dict)


def parse_peer(text: str) -> PeerText:
    """Parses a peer. A value ends at the next comma, or if it is a JSON object, at its end. Raises ValueError."""
    name, separator, rest = text.partition("=")
    url, _, rest = rest.partition(",")
    if not (name and separator and url.startswith(("http://", "https://"))):
        raise ValueError(
            f"{text!r} is no peer: write NAME=URL[,key=value...], as in ours=http://127.0.0.1:8000,model=m"
        )
    options: dict[str, str] = {}
    while rest:
        key, separator, rest = rest.partition("=")
        if key not in PEER_KEYS or not separator:
            raise ValueError(f"peer {name}: {key!r} is no option; there are {', '.join(PEER_KEYS)}")
        try:
            length = json.JSONDecoder().raw_decode(rest)[1] if rest.startswith("{") else (rest + ",").index(",")
        except json.JSONDecodeError as error:
            raise ValueError(f"{rest!r} does not begin with a JSON object: {error}") from error
        options[key], rest = rest[:length], rest[length:].removeprefix(",")
    return PeerText(name, url, options)


def parse_extra_body(text: str) -> dict[str, JsonValue]:
    """Parses a JSON object. Raises ValueError for other text."""
    try:
        body: dict[str, JsonValue] = msgspec.json.decode(text, type=dict)
    except msgspec.DecodeError as error:
        raise ValueError(f"the extra body must be a JSON object, not {text!r}: {error}") from error
    return body


def seed_of(options: argparse.Namespace) -> int:
    """The seed: by default a new one for each run, whose prompts are not in any server's prefix cache yet."""
    return secrets.randbelow(2**31) if options.seed is None else int(options.seed)


def named_peer(text: PeerText, options: argparse.Namespace) -> Peer:
    """A server: its own options before the command's. Raises ValueError for values that do not exist."""
    own = text.options
    api = Api(own.get("api", options.api))
    prompts = own.get("prompts") or options.prompts or ("text" if api is Api.CHAT else "tokens")
    if prompts not in ("tokens", "text") or (api is Api.CHAT and prompts == "tokens"):
        raise ValueError(f"peer {text.name}: prompts {prompts!r} cannot be sent; use tokens (completions only) or text")
    target = Target(
        url=text.url,
        model=own.get("model", options.model),
        api=api,
        ignore_eos=IgnoreEos(own.get("ignore_eos", options.ignore_eos)),
        temperature=options.temperature,
        extra_body=parse_extra_body(own["extra"]) if "extra" in own else options.extra_body,
        api_key=own.get("api_key", options.api_key),
        timeout=options.timeout,
        keeps_alive=options.keep_alive,
        has_done_marker=own.get("done", options.done) == "yes",
    )
    return Peer(
        text.name,
        target,
        sends_text=prompts == "text",
        pid=int(own["pid"]) if "pid" in own else None,
        version=own.get("version"),
        precision=own.get("precision", ""),
        speculation=own.get("speculation", ""),
    )


def hosts_of(options: argparse.Namespace, *, seed: int) -> list[RunningHost]:
    """The servers of a command, in its order. Raises ValueError where names or commands do not fit together."""
    if options.command not in ("compare", "spec"):
        own = {"pid": str(options.pid)} if options.pid is not None else {}
        return [RunningHost(named_peer(PeerText("server", options.url, own), options), seed=seed)]
    peers = [named_peer(text, options) for text in options.peer]
    names = [peer.name for peer in peers]
    commands = dict(options.peer_command)
    unknown = {*commands, *options.ours} - set(names)
    if len(set(names)) < len(names):
        raise ValueError("two peers have the same name; give each its own")
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no peer has that name; there are {', '.join(names)}")
    if options.one_at_a_time and len(commands) < len(peers):
        missing = [name for name in names if name not in commands]
        raise ValueError(f"--one-at-a-time starts and ends every server: give --peer-command for {', '.join(missing)}")
    return [_host(peer, commands.get(peer.name), options, seed) for peer in peers]


def _host(peer: Peer, command: str | None, options: argparse.Namespace, seed: int) -> RunningHost:
    if command is None:
        return RunningHost(peer, seed=seed)
    probe = Exchange(" time" if peer.sends_text else [options.token_ids[0]] * 4, num_output_tokens=1)
    launch = Launch(command, probe, options.start_patience, options.starts)
    kind = RestartingHost if options.one_at_a_time else LaunchingHost
    return kind(peer, launch, seed=seed)


def cases_of(options: argparse.Namespace, *, seed: int) -> list[Case]:
    """One case per load, and the prefill case of `compare`; or that of a scenario or a trace."""
    if options.command == "scenario":
        return [_scenario_case(options, seed)]
    if options.command == "replay":
        return [_replay_case(options, seed)]
    cases = [_case(arrivals, options, seed) for arrivals in _arrivals(options)]
    if options.prefill is not None:
        workload = Workload(FixedLength(options.prefill), FixedLength(1), seed, token_ids=options.token_ids)
        concurrency = options.prefill_concurrency
        plan = Plan(ClosedLoop(concurrency), options.prefill_requests, None, concurrency)
        cases.append(Case(f"prefill {options.prefill}", workload, plan))
    return cases


def scenario_of(options: argparse.Namespace) -> Scenario:
    """The scenario of a command, whose limits and API stand where the command names none. ValueError"""
    scenario = load_scenario(find_scenario(options.scenario))
    options.api = options.api or scenario.api
    if options.api != scenario.api:
        raise ValueError(f"{options.scenario} is of the API {scenario.api}, which its requests are made for")
    options.slo = options.slo or scenario.service_level
    return scenario


def workload_of(options: argparse.Namespace, *, seed: int) -> AnyWorkload:
    """What the options ask for: random prompts, or the traffic of a scenario."""
    if options.scenario is not None:
        scenario = scenario_of(options)
        name = Path(options.scenario).stem
        return TrafficWorkload(scenario, name, seed, scenario.keys(), token_ids=options.token_ids)
    return Workload(
        prompt_length=options.prompt,
        output_length=options.output,
        seed=seed,
        num_shared_tokens=options.shared_prefix_tokens,
        shared_fraction=options.shared_prefix_fraction,
        token_ids=options.token_ids,
    )


def _scenario_case(options: argparse.Namespace, seed: int) -> Case:
    scenario, workload = scenario_of(options), workload_of(options, seed=seed)
    arrivals, closed = scenario.times(rate_factor=options.rate_factor), scenario.arrivals
    num_requests, duration = options.requests, options.duration
    if isinstance(closed, ClosedArrivals):
        num_requests = closed.requests if num_requests is None else num_requests
        duration = closed.seconds if duration is None else duration
    plan = Plan(arrivals, num_requests, duration, _few(options.warmup))
    return Case(workload.name, workload, plan, keeps_samples=True)


def _replay_case(options: argparse.Namespace, seed: int) -> Case:
    trace = read_trace(Path(options.trace)).cut(start=options.start, seconds=options.duration, limit=options.requests)
    trace = with_lengths(
        trace,
        scale=options.length_scale,
        max_prompt_tokens=options.max_prompt_tokens,
        max_output_tokens=options.max_output_tokens,
    )
    workload = TraceWorkload(
        trace.requests, trace.name, seed, block_size=options.block_size, token_ids=options.token_ids
    )
    arrivals = arrivals_of(trace, speed=options.speed)
    return Case(trace.name, workload, Plan(arrivals, None, None, _few(options.warmup)), keeps_samples=True)


def _few(warmup: int | None) -> int:
    return 2 if warmup is None else warmup


def _case(arrivals: Arrivals, options: argparse.Namespace, seed: int) -> Case:
    concurrency = arrivals.concurrency if isinstance(arrivals, ClosedLoop) else 8
    num_requests = options.requests
    if num_requests is None and options.duration is None:
        num_requests = max(8 * concurrency, 16)
    workload = workload_of(options, seed=seed)
    warmup = concurrency if options.warmup is None else options.warmup
    return Case(str(arrivals), workload, Plan(arrivals, num_requests, options.duration, warmup))


def _arrivals(options: argparse.Namespace) -> list[Arrivals]:
    if options.rate is not None:
        return [OpenLoop(rate) for rate in options.rate]
    default = [8] if options.command == "run" else [1, 2, 4, 8, 16, 32]
    return [ClosedLoop(number) for number in options.concurrency or default]
