"""From what was asked for on the command line to the objects that measure."""

from __future__ import annotations

import argparse
import secrets

from loadtest.arrivals import Arrivals, ClosedLoop, OpenLoop
from loadtest.client import Api, IgnoreEos, Target
from loadtest.lengths import parse_length
from loadtest.measure import Case, Peer
from loadtest.peer_text import PeerText, parse_extra_body
from loadtest.runner import Plan
from loadtest.workload import Workload


def seed_of(options: argparse.Namespace) -> int:
    """A new seed for each run by default: with an old one a server finds the last run's prompts in its cache."""
    return secrets.randbelow(2**31) if options.seed is None else int(options.seed)


def peer_of(options: argparse.Namespace) -> Peer:
    """The one server of `run` and `sweep`."""
    own = {"pid": str(options.pid)} if options.pid is not None else {}
    return named_peer(PeerText("server", options.url, own), options)


def named_peer(text: PeerText, options: argparse.Namespace) -> Peer:
    """A peer of `compare`: its own options before the command's. Raises ValueError for values that do not exist."""
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
    return Peer(text.name, target, sends_text=prompts == "text", pid=int(own["pid"]) if "pid" in own else None)


def cases_of(options: argparse.Namespace, *, seed: int) -> list[Case]:
    """One case per load, and the prefill case of `compare`."""
    cases = [_case(arrivals, options, seed) for arrivals in _arrivals(options)]
    if getattr(options, "prefill", None):
        workload = Workload(parse_length(str(options.prefill)), parse_length("1"), seed, token_ids=options.token_ids)
        concurrency = options.prefill_concurrency
        plan = Plan(ClosedLoop(concurrency), options.prefill_requests, None, concurrency)
        cases.append(Case(f"prefill {options.prefill}", workload, plan))
    return cases


def _case(arrivals: Arrivals, options: argparse.Namespace, seed: int) -> Case:
    concurrency = arrivals.concurrency if isinstance(arrivals, ClosedLoop) else 8
    num_requests = options.requests
    if num_requests is None and options.duration is None:
        num_requests = max(8 * concurrency, 16)
    workload = Workload(
        prompt_length=options.prompt,
        output_length=options.output,
        seed=seed,
        num_shared_tokens=options.shared_prefix_tokens,
        shared_fraction=options.shared_prefix_fraction,
        token_ids=options.token_ids,
    )
    warmup = concurrency if options.warmup is None else options.warmup
    return Case(str(arrivals), workload, Plan(arrivals, num_requests, options.duration, warmup))


def _arrivals(options: argparse.Namespace) -> list[Arrivals]:
    if options.rate is not None:
        return [OpenLoop(rate) for rate in _as_list(options.rate)]
    default = 8 if options.command == "run" else [1, 2, 4, 8, 16, 32]
    return [ClosedLoop(int(number)) for number in _as_list(options.concurrency or default)]


def _as_list(value: float | list[float] | list[int]) -> list[float] | list[int]:
    return value if isinstance(value, list) else [value]
