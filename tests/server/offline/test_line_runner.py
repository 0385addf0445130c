"""The runner: each line has one answer, however often it was refused, stopped, cut off and begun again."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.offline.answer_file import AnswerFile
from server.offline.answer_lines import AnswerLine, read_answer
from server.offline.answer_writer import AnswerWriter
from server.offline.fair_slots import FairSlots
from server.offline.line_keys import KeyCollector
from server.offline.line_runner import LineRunner, Patience, Reply, RunEndedError, UnreachableError
from server.offline.request_lines import BadLine, RequestLine


def make_line(number: int) -> RequestLine:
    return RequestLine(number, str(number), "/v1/completions", b"{}")


async def make_lines(numbers) -> AsyncIterator[RequestLine | BadLine]:
    for number in numbers:
        yield make_line(number) if number % 7 else BadLine(number, None, "invalid_line", "it is bad")


class Answers:
    """Where lines are answered: after some turns of the event loop, and as `script` says."""

    def __init__(self, script=None, seed: int = 0) -> None:
        self.sent: list[int] = []
        self.now = self.most = 0
        self._script = script or (lambda line, attempt: Reply(200, "r", b"{}"))
        self._attempts: Counter[int] = Counter()
        self._random = random.Random(seed)

    async def send(self, line: RequestLine) -> Reply:
        self.sent.append(line.number)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(self._random.randrange(5)):
                await asyncio.sleep(0)
            self._attempts[line.number] += 1
            reply = self._script(line, self._attempts[line.number])
            if isinstance(reply, Exception):
                raise reply
            return reply
        finally:
            self.now -= 1


class Kept:
    def __init__(self) -> None:
        self.lines: list[AnswerLine] = []

    async def keep(self, line: AnswerLine) -> None:
        self.lines.append(line)

    @property
    def keys(self) -> Counter[bytes]:
        return Counter(line.key for line in self.lines)


def make_runner(answers, keeper, places: int = 4, **options) -> LineRunner:
    return LineRunner(answers, keeper, FairSlots(lambda: places), seconds_between=lambda _: 0.0, **options)


def expected(numbers) -> Counter[bytes]:
    lines = [make_line(n) if n % 7 else BadLine(n, None, "", "") for n in numbers]
    return Counter(line.key for line in lines)


async def test_every_line_is_answered_once_and_few_are_in_work():
    answers, kept = Answers(), Kept()
    await make_runner(answers, kept).run(make_lines(range(1, 200)))
    assert kept.keys == expected(range(1, 200))
    assert answers.most == 4
    assert sum(line.is_ok for line in kept.lines) == 199 - 28


async def test_refusals_and_broken_connections_are_tried_again_and_errors_are_not():
    def script(line, attempt):
        if line.number == 2 and attempt < 4:
            return UnreachableError("reset")
        if line.number == 3 and attempt < 3:
            return Reply(429, "r", b"{}", is_refusal=True)
        return Reply(500 if line.number == 4 else 200, "r", b"{}")

    answers, kept = Answers(script), Kept()
    await make_runner(answers, kept).run(make_lines(range(1, 6)))
    assert Counter(answers.sent) == {1: 1, 2: 4, 3: 3, 4: 1, 5: 1}
    assert [read_answer(line.data).is_ok for line in sorted(kept.lines, key=lambda line: line.data)].count(False) == 1


async def test_patience_ends_and_lines_without_answers_are_left():
    clock = iter(range(0, 100_000, 50))
    answers = Answers(lambda line, _: Reply(200, "r", b"{}") if line.number < 3 else UnreachableError("refused"))
    kept = Kept()
    runner = make_runner(answers, kept, patience=Patience(600, clock=lambda: next(clock)))
    with pytest.raises(RunEndedError, match=r"no answer has come for .* refused"):
        await runner.run(make_lines(range(1, 100)))
    assert kept.keys == expected([1, 2])


async def test_what_ends_lets_lines_in_work_finish():
    gate = asyncio.Event()

    class Ending(Answers):
        async def send(self, line):
            if line.number == 3:
                raise RunEndedError("the server ends")
            if line.number < 3:
                await gate.wait()
            return await super().send(line)

    kept = Kept()
    running = asyncio.create_task(make_runner(Ending(), kept, places=3).run(make_lines(range(1, 100))))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not running.done()
    gate.set()
    with pytest.raises(RunEndedError, match="the server ends"):
        await running
    assert kept.keys == expected([1, 2])


async def test_a_disk_that_fails_ends_the_run():
    class Full(Kept):
        async def keep(self, line):
            if len(self.lines) == 5:
                raise OSError(28, "No space left on device")
            await super().keep(line)

    kept = Full()
    with pytest.raises(OSError, match="No space left"):
        await make_runner(Answers(), kept).run(make_lines(range(1, 100)))
    assert len(kept.lines) == 5


async def test_stopping_while_a_line_is_refused_leaves_it():
    answers, kept = Answers(lambda *_: Reply(503, "r", b"{}", True, 3600.0)), Kept()
    runner = make_runner(answers, kept)
    running = asyncio.create_task(runner.run(make_lines(range(1, 100))))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(answers.sent) >= 4
    runner.stop()
    await asyncio.wait_for(running, 5)
    assert kept.lines == []


async def test_owners_have_their_places_in_turn():
    slots = FairSlots(lambda: 1)
    order: list[str] = []

    async def work(owner: str) -> None:
        await slots.take(owner, 1)
        order.append(owner)
        await asyncio.sleep(0)
        slots.give_back(1)

    await asyncio.gather(*(work(owner) for owner in ["a"] * 6 + ["b"] * 2))
    assert order[:5] == ["a", "a", "b", "a", "b"] or order[:5] == ["a", "b", "a", "b", "a"]
    assert slots.num_taken == 0


async def test_bytes_are_bounded_but_for_one_line_alone():
    slots = FairSlots(lambda: 10, max_bytes=100)
    await slots.take("a", 1000)
    waiting = asyncio.create_task(slots.take("a", 60))
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.give_back(1000)
    await waiting
    another = asyncio.create_task(slots.take("a", 60))
    await asyncio.sleep(0)
    assert not another.done()
    another.cancel()
    await asyncio.gather(another, return_exceptions=True)
    slots.give_back(60)
    assert slots.num_taken == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["a", "b", "c"])), max_size=40), st.integers(1, 4))
def test_places_are_never_lost_whoever_gives_up(works, places):
    async def run() -> None:
        slots = FairSlots(lambda: places)

        async def work(turns: int, owner: str) -> None:
            await slots.take(owner, 1)
            assert slots.num_taken <= places
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                slots.give_back(1)

        tasks = [asyncio.create_task(work(*each)) for each in works]
        for task in tasks[::3]:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert slots.num_taken == 0
        await asyncio.wait_for(slots.take("z", 1), 1)

    asyncio.run(run())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), max_size=4), st.integers(0, 99))
def test_a_run_that_is_cut_again_and_again_ends_with_each_line_once(tmp_path, count, cuts, seed):
    """Cancelled after some turns of the loop, and the file cut by some bytes: as a kill would leave it."""
    path: Path = tmp_path / "out"
    path.unlink(missing_ok=True)
    asked: Counter[int] = Counter()

    async def go_on(turns: int | None) -> None:
        answers = Answers(seed=seed)
        with AnswerFile(path) as file:
            done = KeyCollector()
            for answer in file.answers():
                done.add(answer.key)
            sealed = done.sealed()
            before = {n for n in range(1, count + 1) if make_line(n).key in sealed}

            async def lines() -> AsyncIterator[RequestLine | BadLine]:
                async for line in make_lines(range(1, count + 1)):
                    if line.key not in sealed:
                        yield line

            async with AnswerWriter(file, file, waits_for_room=False) as writer:
                running = asyncio.create_task(make_runner(answers, writer).run(lines()))
                if turns is not None:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            assert not before & set(answers.sent), "what was answered is not asked again"
            asked.update(answers.sent)

    for turns, num_bytes in cuts:
        asyncio.run(go_on(turns))
        data = path.read_bytes()
        path.write_bytes(data[: max(len(data) - num_bytes, 0)])
    asyncio.run(go_on(None))
    lines = path.read_bytes().splitlines(keepends=True)
    assert Counter(read_answer(line).key for line in lines) == expected(range(1, count + 1))
    assert all(json.loads(line) for line in lines)
