"""The measurements for a GPU as they run on one: tiny shapes, and a simulated device."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from engine.runner.cuda_graphs import GraphLimits
from loadtest.gpu import engine_times, stopwatch
from loadtest.gpu.context import Context
from loadtest.gpu.records import Ceilings, Check, Problem, Record, Timing, Tuned
from loadtest.gpu.sections import SECTIONS, jobs_of
from loadtest.gpu.shapes import TINY, Load
from loadtest.gpu.stopwatch import Stopwatch
from tests.support.simulated_gpu import simulated_gpu

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # to infinity, as it should
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # rows that pad a step hold anything
]


class DeviceContext(Context, frozen=True):
    """A rehearsal's shapes on the device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(stopwatch, "_MAX_CALLS", 2)
    monkeypatch.setattr(Stopwatch.__init__, "__kwdefaults__", {"num_rounds": 1})
    with simulated_gpu(total_bytes=1 << 29) as gpu:
        yield gpu


@pytest.fixture
def context(tmp_path: Path) -> Context:
    ceilings = Ceilings(1e12, 1e14, 1 << 10)
    return DeviceContext(is_rehearsal=True, seed=1, deadline=time.time() + 100, ceilings=ceilings, tables=str(tmp_path))


def _run(section: str, context: Context, *names: str) -> list[Record]:
    """What the section's jobs find whose names begin like that."""
    jobs = jobs_of(SECTIONS[section], context)
    return [record for job in jobs if job.name.startswith(names or "") for record in job.run()]


def test_the_ceilings_are_measured_in_graphs(gpu, context: Context) -> None:
    (ceilings,) = _run("machine", context)
    assert isinstance(ceilings, Ceilings)
    assert gpu.num_graphs == 2


def test_every_kernel_is_checked(gpu, context: Context) -> None:
    checks = _run("checks", context)
    assert len(checks) > 20
    assert all(isinstance(check, Check) and check.is_ok for check in checks)


def test_the_tuner_writes_the_chip_s_table(gpu, context: Context, tmp_path: Path) -> None:
    records = _run("tune", context)
    assert {record.table for record in records if isinstance(record, Tuned)} == {"sm_90.json"}
    assert "Simulated GPU" in (tmp_path / "sm_90.json").read_text()


def test_kernels_are_timed_as_graphs(gpu, context: Context) -> None:
    names = ("decode attention", "store", "log-prob", "linear, down")
    records = _run("kernels", context, *names)
    timed = {record.name for record in records if isinstance(record, Timing)}
    assert all(any(name.startswith(wanted) for name in timed) for wanted in names), timed
    assert {record.job.partition(",")[0] for record in records if isinstance(record, Problem)} <= {"FlashAttention-3"}
    assert gpu.num_graphs >= len(names)


def test_work_that_waits_for_the_device_is_launched_call_by_call(gpu) -> None:
    x = torch.ones(3, device="cuda")
    before = torch.cuda.current_stream()
    assert Stopwatch(x.device, num_rounds=1).time(lambda _: x.sum().item()) > 0
    assert gpu.num_graphs == 0
    assert torch.cuda.current_stream() is before


def test_the_engine_is_timed_with_graphs(gpu, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load([TINY], batches=[2], contexts=[20], num_outputs=5)
    limits = {"num_uses": 0, "num_steps_between": 0, "max_num_graphs": 9}
    monkeypatch.setattr(GraphLimits.__init__, "__kwdefaults__", limits)
    monkeypatch.setattr(engine_times, "_WARM_UP", 3)
    monkeypatch.setattr(engine_times, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(engine_times, "load_of", lambda *, is_rehearsal: load)
    ours, _ = engine_times.jobs(msgspec.structs.replace(context, is_rehearsal=False))
    records = list(ours.run())
    assert all(isinstance(record, Timing) for record in records), records
    assert [record.name for record in records] == ["start, tiny", "prefill, tiny, 2 x 20", "decode, tiny, 2 x 20"]
    assert gpu.num_graphs == 2  # of the token that is tried at the start, and of the batch
    assert gpu.num_replays > 4
