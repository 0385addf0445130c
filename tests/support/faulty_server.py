"""`peregrine serve` on a real model, whose engine fails on order (`tests.support.fault_orders`).

Run as a script with the arguments of `peregrine serve`; the engine process loads this file again, for `build`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from engine.client.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo
from tests.support.fault_orders import FaultOrders


def obey_in_steps(engine: Engine, orders: FaultOrders) -> None:
    """Orders are looked for before each forward pass."""
    launch, step = engine.executor.launch, engine.step

    def obey_and_launch(*arguments: object) -> object:
        orders.obey()
        return launch(*arguments)

    def step_or_circle() -> object:
        return ([], [], None) if orders.goes_in_circles else step()

    engine.executor.launch, engine.step = obey_and_launch, step_or_circle


def build(config: EngineConfig, report: Callable[[str, str], None]) -> tuple[Engine, ModelInfo]:
    from engine.build import build_engine

    orders = FaultOrders.from_environment()
    orders.follow_clock()
    engine, model = build_engine(config, report)
    obey_in_steps(engine, orders)
    return engine, model


if __name__ == "__main__":
    from server.cli.main import layers, make_parser
    from server.cli.serve import serve
    from server.settings import load_config

    FaultOrders.from_environment().follow_clock()
    loaded = load_config(layers(make_parser().parse_fully(["serve", *sys.argv[1:]])))
    sys.exit(serve(loaded, make_engine=partial(EngineClient, factory=f"{__file__}:build")))
