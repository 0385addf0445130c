"""The simulated GPU catches the mistakes that it is there for."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.support.simulated_gpu import SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


@pytest.fixture
def gpu() -> Iterator[object]:
    with simulated_gpu(total_bytes=1 << 20) as gpu:
        yield gpu


@triton.jit
def double_kernel(x_ptr, out_ptr):
    place = tl.program_id(0)
    tl.store(out_ptr + place, 2 * tl.load(x_ptr + place))


def _double(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    double_kernel[(len(x),)](x, out)
    return out


def test_tensors_are_on_the_device_with_views_and_in_place_operations(gpu: SimulatedGpu) -> None:
    x = torch.arange(6, device="cuda").view(2, 3)
    assert x.is_cuda
    assert x[0].device.type == "cuda"
    x[1].add_(10)
    x[:, 0] = 7
    assert x.tolist() == [[7, 1, 2], [7, 14, 15]]
    assert torch.cat((x, x.cpu().to("cuda"))).shape == (4, 3)
    assert not x.cpu().is_cuda
    with torch.device("cuda"):
        assert torch.nn.Linear(3, 2)(torch.ones(1, 3)).is_cuda


def test_devices_do_not_mix(gpu: SimulatedGpu) -> None:
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (lambda: x + host, lambda: torch.cat((x, host)), lambda: x.index_select(0, torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may come from the host


def test_kernels_take_the_device_s_tensors_alone(gpu: SimulatedGpu) -> None:
    assert _double(torch.arange(3, device="cuda")).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="cpu tensor"):
        double_kernel[(3,)](torch.arange(3), torch.empty(3, device="cuda"))
    assert gpu.num_launches == 1


def test_what_is_on_its_way_to_the_host_cannot_be_read_yet(gpu: SimulatedGpu) -> None:
    landing = torch.empty(2, dtype=torch.int64, pin_memory=True)
    landing.copy_(torch.tensor([3, 4], device="cuda"), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    num_waits = gpu.num_waits
    assert landing.tolist() != [3, 4]
    arrived.synchronize()
    assert landing.tolist() == [3, 4]
    assert gpu.num_waits == num_waits  # which an event is not


def test_host_memory_may_not_change_while_it_is_read(gpu: SimulatedGpu) -> None:
    staging = torch.zeros(2, dtype=torch.int64, pin_memory=True)
    numbers: np.ndarray = staging.numpy()
    target = torch.empty(2, dtype=torch.int64, device="cuda")
    target.copy_(staging, non_blocking=True)
    torch.cuda.synchronize()
    numbers[:] = 5
    target.copy_(staging, non_blocking=True)
    numbers[:] = 6
    with pytest.raises(AssertionError, match="was changed"):
        torch.cuda.synchronize()


def test_memory_that_is_not_pinned_makes_the_host_wait(gpu: SimulatedGpu) -> None:
    num_waits = gpu.num_waits
    target = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert gpu.num_waits == num_waits
    for wait in (
        lambda: torch.ones(2).to("cuda", non_blocking=True),
        lambda: torch.tensor([1], device="cuda"),
        lambda: target[target > 0],
        lambda: target[0].item(),
        lambda: target.cpu(),
    ):
        num_waits = gpu.num_waits
        wait()
        assert gpu.num_waits > num_waits


def _captured(work, pool: object = None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        return graph, work()


def test_a_graph_repeats_its_work_on_what_its_inputs_hold(gpu: SimulatedGpu) -> None:
    x = torch.arange(3, device="cuda")
    graph, out = _captured(lambda: _double(x + 1)[1:])
    assert out.tolist() != [4, 6]
    graph.replay()
    assert out.tolist() == [4, 6]
    x.copy_(torch.tensor([0, 10, 20]))
    assert out.tolist() == [4, 6]
    graph.replay()
    assert out.tolist() == [22, 42]


def test_a_graph_s_output_is_gone_when_another_of_its_pool_has_run(gpu: SimulatedGpu) -> None:
    x, pool = torch.ones(2, device="cuda"), torch.cuda.graph_pool_handle()
    (first, doubled), (second, tripled) = _captured(lambda: x * 2, pool), _captured(lambda: x * 3, pool)
    first.replay()
    second.replay()
    assert tripled.tolist() == [3, 3]
    assert doubled.isnan().all()


@pytest.mark.parametrize("work", ["item", "copy", "wait"])
def test_nothing_waits_while_a_graph_is_captured(gpu: SimulatedGpu, work: str) -> None:
    x, host = torch.ones(2, device="cuda"), torch.ones(2, pin_memory=True)
    works = {"item": lambda: x.sum().item(), "copy": lambda: x.copy_(host), "wait": torch.cuda.synchronize}
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="during capture"):
        _captured(works[work])
    assert torch.cuda.current_stream() is not before  # as with torch: whoever goes on has to set it


def test_memory_runs_out_and_comes_back(gpu: SimulatedGpu) -> None:
    kept = torch.zeros(1 << 19, dtype=torch.uint8, device="cuda")
    view = kept[:10]
    assert gpu.used_bytes == 1 << 19
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros((1 << 19) + 1, dtype=torch.uint8, device="cuda")
    del kept
    assert torch.cuda.memory_allocated() == 1 << 19
    del view
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == 1 << 19
