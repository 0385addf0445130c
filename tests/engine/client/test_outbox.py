"""What waits for a reader: its order, its ends, and how often it wakes whom."""

from __future__ import annotations

import asyncio

import pytest

from engine.client.outbox import Outbox
from engine.types import StepOutput


def make_output(name: str) -> StepOutput:
    return StepOutput(request_id=name)


def names_of(outputs: list[StepOutput]) -> str:
    return "".join(output.request_id for output in outputs)


async def test_outputs_are_taken_in_the_order_in_which_they_came_and_no_more_than_asked_for() -> None:
    outbox = Outbox()
    for name in "abcde":
        outbox.put(make_output(name))
    assert [names_of(await outbox.take(2)) for _ in range(3)] == ["ab", "cd", "e"]


async def test_what_comes_together_wakes_the_reader_once() -> None:
    outbox, taken = Outbox(), []

    async def read() -> None:
        while True:
            taken.append(names_of(await outbox.take(4)))

    reading = asyncio.create_task(read())
    for _ in range(10):
        await asyncio.sleep(0)
        for name in "abcd":
            outbox.put(make_output(name))
        await asyncio.sleep(0)
    assert taken == ["abcd"] * 10
    reading.cancel()


async def test_an_error_comes_after_what_was_there_and_nothing_comes_after_it() -> None:
    outbox = Outbox()
    outbox.put(make_output("a"))
    outbox.fail(KeyError("first"))
    outbox.fail(ValueError("second"))
    outbox.put(make_output("b"))
    assert names_of(await outbox.take(9)) == "a"
    for _ in range(2):
        with pytest.raises(KeyError, match="first"):
            await outbox.take(9)


async def test_a_cut_drops_what_was_there() -> None:
    outbox = Outbox()
    outbox.put(make_output("a"))
    outbox.cut(ValueError("cut"))
    with pytest.raises(ValueError, match="cut"):
        await outbox.take(1)


@pytest.mark.parametrize("end", ["fail", "cut"])
async def test_an_error_wakes_the_reader(end: str) -> None:
    outbox = Outbox()
    reading = asyncio.create_task(outbox.take(1))
    await asyncio.sleep(0)
    getattr(outbox, end)(ValueError("over"))
    with pytest.raises(ValueError, match="over"):
        await reading


async def test_a_reader_that_is_cancelled_as_outputs_come_loses_none() -> None:
    outbox = Outbox()
    reading = asyncio.create_task(outbox.take(1))
    await asyncio.sleep(0)
    outbox.put(make_output("a"))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    outbox.put(make_output("b"))
    assert names_of(await outbox.take(9)) == "ab"
