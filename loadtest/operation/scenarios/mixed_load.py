"""A prompt of thousands of tokens arrives amid streams: what the time between their tokens is with it, and without.

Measured, not judged: how much a stream may wait for others' prompts is a setting. What must hold is that every stream
ends with the text that it has without the prompt beside it.
"""

from __future__ import annotations

import asyncio

import msgspec

from loadtest.client.client import Client
from loadtest.client.outcome import Answer
from loadtest.operation.load import percentile_of
from loadtest.operation.served import ServedModel
from loadtest.operation.stage import Stage
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import Exchange, Workload

NUM_STREAMS = 16
STREAM_TOKENS = 192
LONG_PROMPT = 6000  # tokens, or as many as the model takes
ROUNDS = 3
HEAD_START = 1.5  # seconds of the streams


class _Model(msgspec.Struct):
    max_model_len: int = 0


class _Models(msgspec.Struct):
    data: list[_Model]


async def run(stage: Stage) -> None:
    async with stage.serve(has_whole_memory=True) as served:
        streams = stage.exchanges(NUM_STREAMS, max_tokens=STREAM_TOKENS)
        length = min(LONG_PROMPT, await _longest_prompt(served))
        await _stream(stage, served, streams, None)  # warms up
        gaps: dict[str, list[float]] = {"without": [], "with": []}
        first_token: list[float] = []
        texts: list[list[str]] = []
        for number in range(ROUNDS):
            for name in gaps:
                prompt = _long_prompt(stage, length, number) if name == "with" else None
                answers, long = await _stream(stage, served, streams, prompt)
                gaps[name] += [gap for answer in answers for gap in answer.inter_token_latencies()]
                texts.append([answer.text for answer in answers])
                first_token += [] if long is None else [long.time_to_first_token]
    stage.findings.check(
        "every stream has the text that it has without the prompt beside it",
        all(one == texts[0] for one in texts),
        f"{NUM_STREAMS} streams, {len(texts)} times",
    )
    for name, values in gaps.items():
        percentiles = {f"p{p:g}": percentile_of(values, p) for p in (50, 90, 99, 100)}
        stage.findings.note(**{f"inter_token_seconds_{name}": percentiles})
    stage.findings.note(long_prompt_tokens=length, long_prompt_first_token_seconds=first_token)


async def _longest_prompt(served: ServedModel) -> int:
    models = msgspec.json.decode((await served.get("/v1/models")).content, type=_Models)
    longest = models.data[0].max_model_len - 8
    if longest < 1:
        raise RuntimeError("the server does not say how long a prompt may be")
    return longest


def _long_prompt(stage: Stage, length: int, number: int) -> Exchange:
    ids = (0, 255) if stage.is_counting else (1000, 30000)
    return Workload(FixedLength(length), FixedLength(4), seed=stage.options.seed, token_ids=ids).exchange(number)


async def _stream(
    stage: Stage, served: ServedModel, streams: list[Exchange], long: Exchange | None
) -> tuple[list[Answer], Answer | None]:
    """The answers of the streams, and of the prompt that comes amid them. Raises RuntimeError where one fails."""
    async with Client(stage.target(served, timeout=300)) as client:

        async def ask_late(exchange: Exchange) -> Answer:
            await asyncio.sleep(HEAD_START)
            return await _answer(client, exchange)

        asking = None if long is None else asyncio.create_task(ask_late(long))
        answers = await asyncio.gather(*(_answer(client, exchange) for exchange in streams))
        return answers, None if asking is None else await asking


async def _answer(client: Client, exchange: Exchange) -> Answer:
    outcome = await client.send(exchange)
    if not isinstance(outcome, Answer):
        raise RuntimeError(f"a stream failed: {outcome.kind}: {outcome.detail}")
    return outcome
