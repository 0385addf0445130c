"""Rounds on a machine that is not quiet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.client.client import Target
from loadtest.compare.comparison import Comparison, Quietness
from loadtest.compare.hosting import RunningHost
from loadtest.compare.measure import Case, Peer
from loadtest.compare.runner import Plan
from loadtest.report.environment import read_environment
from loadtest.report.session import Measurement, Session
from loadtest.workload.arrivals import ClosedLoop
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import Workload
from tests.support.scripted_server import whole_answer

CASE = Case("one", Workload(FixedLength(4), FixedLength(2), seed=1), Plan(ClosedLoop(1), 2, None, 0))


async def rounds_of(url: str, quietness: Quietness) -> list[Measurement]:
    host = RunningHost(Peer("a", Target(url)), seed=1)
    return await Comparison([host], [CASE], 1, None, quietness).run()


@pytest.mark.parametrize(("max_busy_cores", "is_disturbed"), [(0.0, [True] * 3), (1000.0, [False])])
async def test_disturbed_runs_are_repeated_and_marked(serve, max_busy_cores: float, is_disturbed) -> None:
    """No machine is quieter than zero cores in use, none is busier than a thousand."""
    server = serve(lambda _, served: whole_answer(served))
    measurements = await rounds_of(server.url, Quietness(max_busy_cores, patience=0.0, window=0.02))
    assert [m.is_disturbed for m in measurements] == is_disturbed
    assert all(m.busy_cores is not None for m in measurements)
    prompts = [tuple(request.body["prompt"]) for request in server.served]
    assert len(set(prompts)) == len(prompts) == 2 * len(is_disturbed)


async def test_medians_leave_disturbed_rounds_out_where_they_can(serve) -> None:
    server = serve(lambda _, served: whole_answer(served))
    (quiet,) = await rounds_of(server.url, Quietness(1000.0, patience=0.0, window=0.02))
    disturbed = replace(quiet, is_disturbed=True)
    session = Session("compare", "", 1, read_environment(), [], [CASE.scenario()], [disturbed, quiet])
    assert session.of("one", "a") == [quiet]
    assert replace(session, measurements=[disturbed]).of("one", "a") == [disturbed]
