"""The flight recorder and its trace: bounded, nested, and of the numbers that the steps had."""

from __future__ import annotations

import json
import time
from itertools import pairwise

from engine.types import StepStats
from server.telemetry.chrome_trace import ENGINE, REQUESTS, trace_chunks
from server.telemetry.flight_recorder import NUM_EVENTS, NUM_STEPS, EngineEvent, FlightRecorder
from server.telemetry.request_timeline import Ahead, Timeline
from tests.server.telemetry.test_explanation import Running, step, timing
from tests.server.telemetry.test_metrics import model

T = 500.0


def trace(steps: list, events: list = (), timelines: list = ()) -> list[dict]:
    document = json.loads(b"".join(trace_chunks(steps, events, timelines)))
    assert document["displayTimeUnit"] == "ms"
    return document["traceEvents"]


def test_the_recorder_keeps_the_latest_steps_and_no_more():
    recorder = FlightRecorder()
    stats = step(T, 0.01).stats
    for _ in range(NUM_STEPS + 7):
        recorder.on_step(stats)
    assert len(recorder.steps) == NUM_STEPS
    for index in range(NUM_EVENTS + 5):
        recorder.on_replay(index)
    assert len(recorder.events) == NUM_EVENTS
    assert recorder.events[-1].detail.startswith(f"{NUM_EVENTS + 4} requests")


def test_a_step_costs_one_append():
    """Counted, as times are the machine's: what is kept is what came, and nothing of it is looked at."""

    class Untouchable:
        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"the recorder looks at {name}")

    recorder = FlightRecorder()
    stats = Untouchable()
    recorder.on_step(stats)
    [(kept, received_at)] = recorder.steps
    assert kept is stats
    assert 0 <= time.monotonic() - received_at < 60


def test_the_recorder_tells_what_ran_between_two_moments():
    recorder = FlightRecorder()
    recorder._steps.extend(
        step(T + index, 0.5, num_seqs=index, num_running=index, num_owned_blocks=10 * index) for index in range(6)
    )
    between = recorder.between(T + 2.2, T + 4)
    assert (between.num_steps, between.max_num_running, between.max_kv_usage) == (2, 3, 0.3)
    assert between.mean_num_seqs == 2.5
    assert recorder.between(T + 0.6, T + 0.9).num_steps == 0
    assert recorder.between(T + 0.6, T + 0.9).longest is None


def test_phases_lie_inside_their_step_and_steps_follow_each_other():
    steps = [
        step(T + 0.1 * index, 0.05, schedule=0.001, sample=0.002, update=0.0003, propose=0.0001 / 3)
        for index in range(450)
    ]
    events = [event for event in trace(steps) if event["ph"] == "X"]
    whole = [event for event in events if event["name"].endswith("tokens")]
    assert len(whole) == 450
    assert len(events) == 450 * 6
    for first, second in pairwise(whole):
        assert first["ts"] + first["dur"] <= second["ts"]
    for index, event in enumerate(whole):
        phases = events[6 * index + 1 : 6 * index + 6]
        assert [phase["name"] for phase in phases] == ["schedule", "forward", "sample", "update", "propose"]
        assert phases[0]["ts"] == event["ts"]
        assert phases[-1]["ts"] + phases[-1]["dur"] <= event["ts"] + event["dur"] + 0.01  # of a microsecond: rounding
    assert whole[0]["ts"] == 0.0
    assert whole[0]["args"]["sequences"] == 16


def test_counters_are_written_where_they_change():
    steps = [step(T, 0.1), step(T + 1, 0.1), step(T + 2, 0.1, num_running=3)]
    counters = [event for event in trace(steps) if event["ph"] == "C"]
    assert [(event["name"], event["ts"]) for event in counters] == [
        ("sequences", 0.0), ("KV blocks", 0.0), ("sequences", 2e6),
    ]  # fmt: skip
    assert counters[-1]["args"] == {"running": 3, "waiting": 3}


def test_requests_have_their_parts_and_the_engine_its_events():
    timeline = Timeline("req", "", T)
    timeline.admit(Running([1, 2], first=timing(1.0, 0.5)), Ahead(), T + 0.25)
    timeline.begin_answer(T + 2)
    timeline.end("stop", 200, T + 3)
    waiting = Timeline("waits", "", T + 1)
    waiting.admit(Running([1, 2], name="cmpl-2"), Ahead(), T + 1)
    old = Timeline("old", "", T - 9)
    old.end("stop", 200, T - 8)
    events = trace(
        [step(T, 0.1)],
        [EngineEvent(T + 1, "died", "killed"), EngineEvent(T - 5, "ready", "")],
        [old, timeline, waiting],
    )
    begins = [event for event in events if event["ph"] == "b"]
    assert [(event["name"], event["ts"]) for event in begins] == [
        ("cmpl-1", 0.0), ("before the queue", 0.0), ("queued", 0.25e6), ("prefill", 1.25e6), ("decode", 2e6),
        ("cmpl-2", 1e6), ("before the queue", 1e6), ("queued or in prefill", 1e6),
    ]  # fmt: skip
    ends = [event for event in events if event["ph"] == "e"]
    assert sorted((event["name"], event["id"]) for event in begins) == sorted((e["name"], e["id"]) for e in ends)
    assert {event["pid"] for event in begins + ends} == {REQUESTS}
    [died] = [event for event in events if event["ph"] == "i"]
    assert (died["name"], died["ts"], died["pid"]) == ("died", 1e6, ENGINE)


def test_an_empty_recorder_gives_an_empty_trace():
    assert {event["ph"] for event in trace([])} == {"M"}


def test_the_recorder_notes_what_befalls_the_engine():
    recorder = FlightRecorder()
    recorder.on_ready(model())
    recorder.on_death("killed")
    assert [event.name for event in recorder.events] == ["ready", "died"]


def test_a_step_says_when_it_began_and_how_long_it_took():
    stats = step(T, 0.2, schedule=0.1).stats
    assert isinstance(stats, StepStats)
    assert stats.seconds == 0.2 + 0.1
