"""CUDA graphs over recorded work: steps that are replayed say what eager ones say, and what is not recorded runs."""

import random
from collections import Counter, defaultdict

import pytest
import torch

from engine.engine import Engine
from engine.runner.cuda_graphs import CudaGraphDevice, padded_sizes
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.recorded_graphs import BLOCK_SIZE, FakeGraphDevice, Setup
from tests.support.simulated_gpu import simulated_gpu
from tests.support.stepping import forward, inputs_for
from tests.support.tiny_llamas import CONFIGS, VOCAB_SIZE


def _run(engine: Engine, seed: int = 0) -> dict[str, list[int]]:
    rng = random.Random(seed)
    outputs: dict[str, list[int]] = defaultdict(list)
    requests = []
    for i in range(16):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(seed=i, max_tokens=rng.randrange(1, 30), temperature=rng.choice([0.0, 0.9]))
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while requests or engine.has_work:
        for request in requests[: rng.choice([0, 1, 2])]:
            engine.add(requests.pop(requests.index(request)))
        for output in engine.step()[0]:
            assert output.error is None
            outputs[output.request_id] += output.token_ids
    assert engine.scheduler.kv.pool.num_owned == 0
    return outputs


@pytest.mark.parametrize("kind", ["plain", "overlap", "drafts"])
@pytest.mark.parametrize("model", CONFIGS)
def test_replayed_steps_say_what_eager_ones_say(model: str, kind: str) -> None:
    device = FakeGraphDevice()
    setup = Setup(model, device, max_rows_per_seq=4 if kind == "drafts" else 1)
    engine = setup.engine(has_drafts=kind == "drafts", overlap=kind == "overlap")
    assert _run(engine) == _run(Setup(model, None).engine())
    assert len(set(device.num_rows)) > 3
    assert device.num_replays > 3 * len(device.graphs)
    assert model != "full" or engine.scheduler.num_preemptions > 0


def test_sizes_leave_little_padding() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(6) == [1, 2, 4, 6]
    assert padded_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    sizes = padded_sizes(512)
    assert sizes[-2:] == [480, 512]
    for smaller, larger in zip([0, *sizes], sizes, strict=False):
        assert larger - smaller <= max(8, larger // 8)


def _scheduled(num_tokens: int, *, first_block: int, num_new: int = 1, num_drafts: int = 0) -> Scheduled:
    token_ids = [(num_tokens + i) % VOCAB_SIZE for i in range(num_tokens)]
    params = SamplingParams(seed=0, max_tokens=9)
    seq = Sequence(Request(request_id="a", prompt_token_ids=token_ids, params=params), token_ids)
    seq.num_computed_tokens = num_tokens - num_new
    seq.draft_token_ids, seq.draft_parents = [1] * num_drafts, list(range(-1, num_drafts - 1))
    seq.block_tables = [list(range(first_block, first_block - (-(num_tokens + num_drafts) // BLOCK_SIZE)))]
    return Scheduled(seq, num_new + num_drafts, num_drafts, samples=True)


def _decode(num_seqs: int, num_tokens: int = 7) -> list[Scheduled]:
    return [_scheduled(num_tokens, first_block=1 + 8 * i) for i in range(num_seqs)]


def _forward(setup: Setup, batch: list[Scheduled]) -> bool:
    """Whether the step was a graph's. What it computes must be what it computes eagerly."""
    assert setup.graphs is not None
    with torch.inference_mode():
        hidden = setup.graphs.forward(inputs_for(setup.runner, batch), None)
        if hidden is None:
            return False
        hidden = hidden.clone()
        setup.runner.graphs, graphs = type("Off", (), {"forward": lambda *_: None})(), setup.runner.graphs
        torch.testing.assert_close(hidden, forward(setup.runner, batch)[0], rtol=1e-4, atol=1e-5)
        setup.runner.graphs = graphs
    return True


def test_a_size_is_captured_when_it_has_come_up_often_and_not_soon_after_another() -> None:
    setup = Setup("full", FakeGraphDevice(), num_uses=2, num_steps_between=4)
    assert [_forward(setup, _decode(2)) for _ in range(4)] == [False, False, True, True]
    assert [_forward(setup, _decode(4)) for _ in range(6)] == [False] * 4 + [True] * 2
    assert [_forward(setup, _decode(3)) for _ in range(2)] == [True] * 2  # padded to four
    assert [_forward(setup, _decode(1)) for _ in range(5)] == [False] * 4 + [True]


def test_the_graph_that_was_used_least_recently_makes_room() -> None:
    device = FakeGraphDevice()
    setup = Setup("full", device, max_num_graphs=2)
    for num_seqs in (1, 2, 1, 4, 1, 2):
        assert _forward(setup, _decode(num_seqs))
    assert device.num_rows == [1, 2, 4, 2]


def test_a_failed_capture_is_said_once_and_steps_go_on(caplog: pytest.LogCaptureFixture) -> None:
    device = FakeGraphDevice(max_num_captures=1)
    engine = Setup("full", device).engine()
    assert _run(engine) == _run(Setup("full", None).engine())
    assert len(device.num_rows) == 2
    assert device.num_replays > 0
    assert len([record for record in caplog.records if "could not be captured" in record.message]) == 1


def test_a_capture_is_tried_again_after_many_steps() -> None:
    device = FakeGraphDevice(max_num_captures=0)
    setup = Setup("full", device)
    assert not _forward(setup, _decode(2))
    assert setup.runner.graphs.breaker.is_open
    device.max_num_captures = 99
    were_graphs = [_forward(setup, _decode(2)) for _ in range(300)]
    assert were_graphs.index(True) > 200
    assert all(were_graphs[were_graphs.index(True) :])


def test_what_no_graph_covers_runs_eagerly() -> None:
    device = FakeGraphDevice()
    setup = Setup("full", device, max_rows_per_seq=4)
    chunk = _scheduled(9, first_block=60, num_new=5)
    drafts = _scheduled(9, first_block=60, num_drafts=3)
    tree = _scheduled(9, first_block=60, num_drafts=3)
    tree.seq.draft_parents = [-1, -1, 0]
    too_many_drafts = _scheduled(9, first_block=60, num_drafts=4)
    unfinished = Scheduled(chunk.seq, 1, 0, samples=False)
    scored = Scheduled(chunk.seq, 2, 0, samples=True, num_scored=1)
    for item in (chunk, tree, too_many_drafts, unfinished, scored):
        assert not _forward(setup, [*_decode(2), item])
    assert _forward(setup, [*_decode(2), drafts])
    assert not _forward(setup, _decode(7))
    setup.attention.max_context = 8
    assert _forward(setup, _decode(2, num_tokens=8))
    assert not _forward(setup, _decode(2, num_tokens=9))


def test_steps_with_drafts_have_graphs_of_their_own() -> None:
    device = FakeGraphDevice()
    setup = Setup("full", device, max_rows_per_seq=4)
    one_drafts = [*_decode(3), _scheduled(9, first_block=60, num_drafts=1)]
    for _ in range(2):
        assert _forward(setup, _decode(4))
        assert _forward(setup, one_drafts)  # five rows, padded to eight
    assert device.num_rows == [4, 8]
    assert Counter(graph.num_replays for graph in device.graphs) == {2: 2}


def test_graphs_are_given_up_when_memory_is_needed() -> None:
    device = FakeGraphDevice()
    setup = Setup("full", device)
    assert _forward(setup, _decode(2))
    setup.runner.release_memory()
    assert _forward(setup, _decode(2))
    assert device.num_rows == [2, 2]


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    with simulated_gpu() as gpu:
        device, before = CudaGraphDevice(), torch.cuda.current_stream()
        x = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="during capture"):
            device.capture(lambda: x * x.sum().item())  # which may wait while it only warms up
        assert torch.cuda.current_stream() is before
        assert device.capture(lambda: x * 2).replay().tolist() == [2, 2]
        assert torch.cuda.current_stream() is before
    assert gpu.num_graphs == 1
