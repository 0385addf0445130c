"""A server whose fake engine has a given chat template, special tokens of its own, and room for long prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import msgspec
import openai
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine.ipc.messages import TokenizerAssets
from server.structured.grammar_checker import GrammarChecker
from server.text.tokenizer import Tokenizer
from tests.support.fake_engine import FakeEngine, make_assets, make_model
from tests.support.server_world import World, make_world

CONTEXT = 1 << 16
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "Tells the time."}}


@cache
def assets_with(template: str | None, special: tuple[str, ...], added: tuple[str, ...]) -> TokenizerAssets:
    """special, added: tokens beside the tiny tokenizer's own; those added show in a text"""
    plain = make_assets(template)
    backend = Backend.from_str(plain.tokenizer_json)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return msgspec.structs.replace(plain, tokenizer_json=backend.to_str())


@contextmanager
def tool_world(template: str | None, *, special: Sequence[str] = (), added: Sequence[str] = ()) -> Iterator[World]:
    assets = assets_with(template, tuple(special), tuple(added))
    model = make_model(assets, 330 + len(special) + len(added))
    model = msgspec.structs.replace(model, max_model_len=CONTEXT, num_kv_tokens=10 * CONTEXT)
    world = make_world(template)
    world.engine = FakeEngine(model, Tokenizer(assets))
    world.tokenizer = world.state.tokenizer = world.engine.tokenizer
    world.state.engine = world.engine
    world.state.grammar_checker = GrammarChecker()  # of this vocabulary
    try:
        yield world
    finally:
        world.state.grammar_checker.close()


@contextmanager
def openai_client(world: World) -> Iterator[openai.OpenAI]:
    """OpenAI's own, over real HTTP."""
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(world: World) -> str:
    """The newest request's, special tokens included."""
    return world.tokenizer.decode(world.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
