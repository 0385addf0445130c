"""What the server's tests are given: a server without an engine, and a real one around an engine that is directed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

import httpx
import pytest

from engine.ipc.messages import TokenizerAssets
from server.text.tokenizer import Tokenizer
from tests.support.fake_engine import make_assets, make_tokenizer
from tests.support.operated_server import Operation, start_operation
from tests.support.server_world import World, connect, make_world


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def assets() -> TokenizerAssets:
    return make_assets()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(world) as client:
        yield client


@pytest.fixture(scope="session")
def operate() -> Callable[..., AbstractContextManager[Operation]]:
    """`with operate({"server": {"strict": True}}, ready=False) as operation`: real HTTP, at `operation.url`."""
    return start_operation
