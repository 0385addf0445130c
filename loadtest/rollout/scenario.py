"""What is done to replicas behind a balancer while clients send requests: a rolling restart, and a kill."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx

from loadtest.compare.launch import free_ports
from loadtest.rollout.balancers import BALANCERS, version_of
from loadtest.rollout.processes import RolloutProcess
from loadtest.rollout.traffic import Account, Loss, Traffic

START_PATIENCE = 240.0  # seconds
END_PATIENCE = 150.0  # seconds: more than a replica's drain_delay and shutdown_timeout
NUM_DIRECT = 16  # streams that are sent without the balancer, to compare


@dataclass(frozen=True)
class Options:
    """command: starts a replica, to which `--host ADDRESS --port PORT` is added. settle: seconds between a replica's
    readiness and the next one's restart, as rollouts of orchestrators have it (minReadySeconds)."""

    command: Sequence[str]
    model: str
    num_replicas: int = 3
    num_requests: int = 2000
    num_clients: int = 24
    max_tokens: int = 16
    settle: float = 3.0


@dataclass(frozen=True)
class Restart:
    """Of one replica: seconds from the signal to its end and from its start to readiness."""

    replica: str
    exit_code: int
    drain_seconds: float
    start_seconds: float


@dataclass(frozen=True)
class Part:
    """What clients saw during one part of a run. Losses are split by whether some of the answer had come."""

    num_sent: int
    answered: dict[str, int]
    num_lost: int
    num_lost_before_begin: int
    losses: list[Loss]
    seconds: float
    median_first_token_seconds: float


@dataclass(frozen=True)
class BalancerRun:
    balancer: str
    version: str
    rolling_restart: Part
    restarts: list[Restart]
    kill: Part
    num_direct_streams: int
    median_direct_first_token_seconds: float  # of streams one after the other, without the balancer
    median_balanced_first_token_seconds: float  # the same through it

    @property
    def is_good(self) -> bool:
        """A rolling restart loses nothing, a kill only answers that had begun."""
        return not self.rolling_restart.num_lost and not self.kill.num_lost_before_begin


@dataclass
class Replicas:
    """The replicas, each at an address of its own and all at one port, as containers of one service are."""

    options: Options
    folder: Path
    port: int = field(default_factory=lambda: free_ports(1)[0])
    processes: dict[str, RolloutProcess] = field(default_factory=dict)

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.{2 + index}" for index in range(self.options.num_replicas)]

    def start(self, address: str) -> RolloutProcess:
        command = [*self.options.command, "--host", address, "--port", str(self.port)]
        url = f"http://{address}:{self.port}/readyz"
        log = self.folder / f"replica-{address}.log"
        process = RolloutProcess(f"replica {address}", command, url=url, log=log, environment={})
        self.processes[address] = process
        return process

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()


async def run(name: str, options: Options, folder: Path) -> BalancerRun:
    """Starts replicas and a balancer, and does both to them. Everything has ended afterwards.

    Raises RuntimeError where a process does not start or end, ValueError where the balancer is not installed.
    """
    version = version_of(name)
    replicas = Replicas(options, folder)
    with ExitStack() as stack:
        stack.callback(replicas.kill)
        async with (
            httpx.AsyncClient(timeout=10) as client,
            BALANCERS[name](replicas.addresses, replicas.port, folder) as balancer,
        ):
            for address in replicas.addresses:  # one after the other: the first compiles, if anything has to be
                await replicas.start(address).wait_until_ready(client, patience=START_PATIENCE)
            await balancer.wait_until_ready(client, patience=30)
            await asyncio.sleep(options.settle)
            url = balancer.url.removesuffix("/readyz")
            direct = await _one_by_one(f"http://{replicas.addresses[0]}:{replicas.port}", options)
            balanced = await _one_by_one(url, options)
            rolling, restarts = await _roll(url, replicas, client)
            kill = await _kill(url, replicas, client)
    return BalancerRun(
        balancer=name,
        version=version,
        rolling_restart=rolling,
        restarts=restarts,
        kill=kill,
        num_direct_streams=NUM_DIRECT,
        median_direct_first_token_seconds=round(direct, 4),
        median_balanced_first_token_seconds=round(balanced, 4),
    )


async def _one_by_one(url: str, options: Options) -> float:
    """The median seconds to the first byte of streams that are sent one after the other."""
    traffic = Traffic(url, options.model, num_clients=1, max_tokens=options.max_tokens)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for number in range(NUM_DIRECT):
            await traffic.send(client, 4 * number)  # the first of every four kinds: streams
    return median(traffic.account.first_token_seconds)


async def _roll(url: str, replicas: Replicas, client: httpx.AsyncClient) -> tuple[Part, list[Restart]]:
    """Restarts every replica by SIGTERM, one after the other, under traffic that lasts for as long, and no shorter
    than `num_requests`."""
    options = replicas.options
    restarts: list[Restart] = []

    async def restart_all() -> None:
        await asyncio.sleep(1.0)  # traffic first
        for address in replicas.addresses:
            begun = time.monotonic()
            replicas.processes[address].send(signal.SIGTERM)
            code = await replicas.processes[address].wait(patience=END_PATIENCE)
            drained = time.monotonic() - begun
            started = await replicas.start(address).wait_until_ready(client, patience=START_PATIENCE)
            restarts.append(Restart(address, code, round(drained, 3), round(started, 3)))
            print(f"  {address} restarted: {drained:.1f} s to its end, {started:.1f} s to readiness", file=sys.stderr)
            await asyncio.sleep(options.settle)

    part = await _traffic_while(url, options, restart_all(), at_least=options.num_requests)
    return part, restarts


async def _kill(url: str, replicas: Replicas, client: httpx.AsyncClient) -> Part:
    """Kills a replica under traffic, and starts it again."""
    options = replicas.options

    async def kill_one() -> None:
        await asyncio.sleep(2.0)
        address = replicas.addresses[-1]
        replicas.processes[address].send(signal.SIGKILL)
        await replicas.processes[address].wait(patience=END_PATIENCE)
        await asyncio.sleep(options.settle)
        await replicas.start(address).wait_until_ready(client, patience=START_PATIENCE)

    return await _traffic_while(url, options, kill_one(), at_least=options.num_requests // 10)


async def _traffic_while(url: str, options: Options, act: Coroutine[None, None, None], *, at_least: int) -> Part:
    traffic = Traffic(url, options.model, num_clients=options.num_clients, max_tokens=options.max_tokens)
    acting = asyncio.create_task(act)
    begun = time.monotonic()
    try:
        await traffic.run(lambda: acting.done() and traffic.account.num_sent >= at_least)
    finally:
        acting.cancel()
    await acting  # raises what it raised
    return _part(traffic.account, time.monotonic() - begun)


def _part(account: Account, seconds: float) -> Part:
    return Part(
        num_sent=account.num_sent,
        answered=account.answered,
        num_lost=len(account.losses),
        num_lost_before_begin=sum(not loss.has_begun for loss in account.losses),
        losses=account.losses[:50],
        seconds=round(seconds, 3),
        median_first_token_seconds=round(median(account.first_token_seconds or [0.0]), 4),
    )
