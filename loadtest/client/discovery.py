"""What a server says of itself: its model, its version, and how many tokens words make."""

from __future__ import annotations

import httpx
import msgspec
import numpy as np

from loadtest.client.client import Client, Target
from loadtest.client.outcome import Answer
from loadtest.workload.prompts import WORDS, Exchange, PromptText

_SHORT, _LONG = 8, 136  # words; two points make the line


def _http(target: Target) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=target.base_url, headers=target.authorization, timeout=30.0)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def first_model(target: Target) -> str:
    """The model that GET /v1/models names first. Raises ValueError if the server has no such list."""
    try:
        async with _http(target) as http:
            response = await http.get("/v1/models")
        models = msgspec.json.decode(response.content, type=_Models).data
    except httpx.TransportError as error:
        raise ValueError(f"{target.base_url}: {error}; is the server up?") from error
    except msgspec.DecodeError as error:
        status = response.status_code
        raise ValueError(f"{target.base_url}: no usable list of models (status {status}); name the model") from error
    if not models:
        raise ValueError(f"{target.base_url} lists no models; name the model")
    return models[0].id


class _Version(msgspec.Struct):
    version: str | None = None
    build_info: str | None = None


async def server_version(target: Target) -> str | None:
    """What GET /version says, or the build in GET /props (llama-server); None where neither is known."""
    async with _http(target) as http:
        for path in ("/version", "/props"):
            try:
                response = await http.get(path)
                answer = msgspec.json.decode(response.content, type=_Version)
            except (httpx.TransportError, msgspec.DecodeError):
                continue
            if response.status_code == 200 and (answer.version or answer.build_info):
                return answer.version or answer.build_info
    return None


async def calibrate(target: Target, *, seed: int) -> PromptText:
    """How many words make a prompt of so many tokens, for servers that take text only.

    Asks the server itself, through the `usage` of two short answers: any server that reports usage can be asked.

    Raises ValueError if it does not, or fails.
    """
    random = np.random.default_rng(seed)
    async with Client(target) as client:
        short = await _num_tokens(client, _words(random, _SHORT))
        long = await _num_tokens(client, _words(random, _LONG))
    if long <= short:
        counts = f"{short} tokens of {_SHORT} words and {long} of {_LONG}"
        raise ValueError(
            f"{target.base_url}: its usage counts {counts}, so text prompts cannot be sized; send token ids"
        )
    tokens_per_word = (long - short) / (_LONG - _SHORT)
    return PromptText(tokens_of_template=short - tokens_per_word * _SHORT, tokens_per_word=tokens_per_word)


def _words(random: np.random.Generator, num_words: int) -> str:
    return "".join(f" {WORDS[i]}" for i in random.integers(0, len(WORDS), size=num_words))


async def _num_tokens(client: Client, text: str) -> int:
    url = client.target.base_url
    outcome = await client.send(Exchange(text, num_output_tokens=4))
    if not isinstance(outcome, Answer):
        raise ValueError(f"{url}: no answer to count prompt tokens by: {outcome.kind}: {outcome.detail}")
    if outcome.num_prompt_tokens < 1:
        raise ValueError(f"{url} reports no usage, so text prompts cannot be sized; send token ids")
    return outcome.num_prompt_tokens
