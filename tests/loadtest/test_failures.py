"""What is not a complete answer is counted by its kind, and is in no other figure."""

from __future__ import annotations

import socket

import pytest

from loadtest.client.client import Client, IgnoreEos, Target
from loadtest.client.outcome import Answer, Failure, Outcome
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan, run
from loadtest.report.statistics import summarize
from loadtest.workload.arrivals import ClosedLoop
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import Exchange, Workload
from tests.support.scripted_server import DONE, Reply, event, whole_answer

NUM_TOKENS = 3
EXCHANGE = Exchange([5, 6, 7], NUM_TOKENS)


async def outcome_of(url: str, *, timeout: float = 10.0, ignore_eos: IgnoreEos = IgnoreEos.SENT, **more) -> Outcome:  # noqa: ASYNC109
    async with Client(Target(url, model="scripted", timeout=timeout, ignore_eos=ignore_eos, **more)) as client:
        return await client.send(EXCHANGE)


def broken_replies() -> dict[str, object]:
    """A reply for each way in which a stream can fail, by the kind it must be counted as."""
    tokens = [(0.0, event(f" t{i}")) for i in range(NUM_TOKENS)]
    end = (0.0, event(finish_reason="length"))
    usage, few = (0.0, event(usage=(3, NUM_TOKENS))), (0.0, event(usage=(3, NUM_TOKENS - 1)))
    marker = (0.0, DONE)
    return {
        "http_500": Reply(((0.0, b'{"error": {"message": "a bug"}}'),), status=500, content_type="application/json"),
        "http_429": Reply(((0.0, b'{"error": {"message": "full"}}'),), status=429, content_type="application/json"),
        "not_a_stream": Reply(((0.0, b'{"choices": []}'),), content_type="application/json"),
        "bad_event": Reply((*tokens, (0.0, b"data: {not json\n\n"), end, usage, marker)),
        "error_event": Reply((*tokens[:1], (0.0, b'data: {"error": {"message": "out of memory"}}\n\n'), marker)),
        "cut": Reply((*tokens, end, usage)),
        "no_finish_reason": Reply((*tokens, usage, marker)),
        "unfinished": Reply((*tokens, (0.0, event(finish_reason="abort")), usage, marker)),
        "wrong_length": Reply((*tokens[:2], end, few, marker)),
        "disconnect": Reply(tuple(tokens), ending="disconnect"),
        "twice": Reply((*tokens, end, (0.0, event(" more")), usage, marker)),
        "empty": Reply((end, (0.0, event(usage=(3, 0))), marker)),
    }


KINDS = (
    "http_500 http_429 not_a_stream bad_event error_event cut no_finish_reason unfinished wrong_length disconnect twice"
)


@pytest.mark.parametrize("kind", KINDS.split())
async def test_a_broken_answer_is_a_failure_of_its_kind(serve, kind: str) -> None:
    server = serve(lambda *_: broken_replies()[kind])
    outcome = await outcome_of(server.url)
    assert isinstance(outcome, Failure)
    assert (outcome.kind, bool(outcome.detail)) == (kind, True)


async def test_an_answer_without_a_token_is_a_failure(serve) -> None:
    server = serve(lambda *_: broken_replies()["empty"])
    outcome = await outcome_of(server.url, ignore_eos=IgnoreEos.NO)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "empty"


async def test_a_stream_cut_inside_an_event_is_a_failure(serve) -> None:
    def without_the_last_byte(_: int, served) -> object:
        whole = b"".join(piece for _, piece in whole_answer(served).pieces)
        return Reply(((0.0, whole[:-1]),))

    server = serve(without_the_last_byte)
    outcome = await outcome_of(server.url)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "cut"


async def test_a_server_that_never_answers_is_a_timeout(serve) -> None:
    server = serve(lambda *_: Reply((), ending="hang"))
    outcome = await outcome_of(server.url, timeout=0.2)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "timeout"
    assert 0.2 <= outcome.failed_at - outcome.started_at < 2


async def test_a_server_that_stops_in_the_middle_is_a_timeout(serve) -> None:
    server = serve(lambda *_: Reply(((0.0, event(" one")),), ending="hang"))
    outcome = await outcome_of(server.url, timeout=0.2)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "timeout"


async def test_a_refused_connection_is_a_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        outcome = await outcome_of(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert isinstance(outcome, Failure)
    assert outcome.kind == "connect"


async def test_what_is_not_http_is_a_failure(serve) -> None:
    garbage = Reply(((0.0, b"220 mail.example ESMTP\r\n"),))
    server = serve(lambda *_: garbage)
    server._play = lambda reply, served, writer: _write(writer, reply.pieces[0][1])
    outcome = await outcome_of(server.url)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "disconnect"


async def _write(writer, data: bytes) -> bool:
    writer.write(data)
    await writer.drain()
    return False


async def test_failures_enter_no_figure_but_the_count_of_errors(serve) -> None:
    """Of twelve kinds of broken answers and as many good ones, only the good ones are measured."""
    replies = list(broken_replies().values())

    def alternate(index: int, served) -> object:
        return replies[index // 2] if index % 2 and index // 2 < len(replies) else whole_answer(served)

    server = serve(alternate)
    workload = Workload(FixedLength(3), FixedLength(NUM_TOKENS), seed=3)
    async with Client(Target(server.url, model="scripted", timeout=10)) as client:
        plan = Plan(ClosedLoop(1), 2 * len(replies), None, 0)
        outcomes = [*(await run(client, workload, plan, progress=Progress())).values()]
    figures = summarize(outcomes)
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    # asked for three tokens, an answer of none is first of all one of the wrong length
    assert figures.errors == {**dict.fromkeys(KINDS.split(), 1), "wrong_length": 2}
    assert (figures.num_answers, figures.num_failures) == (len(answers), len(replies)) == (12, 12)
    assert figures.num_output_tokens == 12 * NUM_TOKENS
    assert figures.num_prompt_tokens == 12 * 3
    assert figures.inter_token_latency.count == 12 * (NUM_TOKENS - 1)
    assert figures.time_to_first_token.count == figures.end_to_end.count == 12


async def test_without_ignore_eos_an_answer_may_be_short(serve) -> None:
    server = serve(lambda *_: broken_replies()["wrong_length"])
    outcome = await outcome_of(server.url, ignore_eos=IgnoreEos.NO)
    assert isinstance(outcome, Answer)
    assert outcome.num_output_tokens == 2
    assert "ignore_eos" not in server.served[0].body


async def test_a_server_without_end_marker_can_be_measured_if_that_is_said(serve) -> None:
    server = serve(lambda *_: broken_replies()["cut"])
    outcome = await outcome_of(server.url, has_done_marker=False)
    assert isinstance(outcome, Answer)
    assert outcome.num_output_tokens == NUM_TOKENS


async def test_a_warm_up_that_fails_altogether_ends_the_run_with_the_reason(serve) -> None:
    server = serve(lambda *_: broken_replies()["http_500"])
    workload = Workload(FixedLength(3), FixedLength(2), seed=3)
    async with Client(Target(server.url, model="scripted")) as client:
        with pytest.raises(RuntimeError, match=r"all 2 warm-up requests failed.*http_500.*a bug"):
            await run(client, workload, Plan(ClosedLoop(2), 4, None, 2), progress=Progress())
