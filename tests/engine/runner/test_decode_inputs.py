"""Steps of the same sequences, one after the other: the same numbers as if they were gathered anew each time."""

import random

import numpy as np
import pytest
import torch

from engine.batch.device_inputs import DeviceTables
from engine.kv_cache.manager import KVCacheManager
from engine.runner.decode_inputs import DecodeRun
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_MODEL_LEN = 100


def _sequence(num_tokens: int, kv: KVCacheManager, max_tokens: int = 1000) -> Sequence:
    """Its newest token is being computed."""
    params = SamplingParams(seed=0, max_tokens=max_tokens)
    prompt = list(range(num_tokens))
    seq = Sequence(Request(request_id="a", prompt_token_ids=prompt, params=params), list(prompt))
    seq.num_computed_tokens = num_tokens - 1
    seq.max_num_tokens = min(num_tokens + max_tokens, MAX_MODEL_LEN)
    assert kv.allocate(seq, num_tokens)
    return seq


def _go_on(seqs: list[Sequence], kv: KVCacheManager) -> None:
    """As the scheduler does when a step is over."""
    for seq in seqs:
        seq.num_computed_tokens += 1
        seq.token_ids.append(7)
        kv.commit(seq)


def _start(seqs: list[Sequence], kv: KVCacheManager) -> DecodeRun:
    """A run whose first step comes after one that is in flight: each sequence has a place for its next token."""
    for seq in seqs:
        assert kv.allocate(seq, len(seq.token_ids) + 1)
    plan = [Scheduled(seq, 1, 0, samples=True, num_ahead=1, source=row) for row, seq in enumerate(seqs)]
    builder = StepBuilder(BLOCK_SIZE, 100, num_groups=kv.num_groups)
    return DecodeRun(plan, builder.build(plan), kv=kv, builder=builder)


@pytest.mark.parametrize("windows", [[None], [6], [6, None, 30]])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_has_the_inputs_of_each_step(seed: int, windows: list[int | None]) -> None:
    rng = random.Random(seed)
    kv = KVCacheManager(300 * len(windows), BLOCK_SIZE, windows=windows)
    seqs = [_sequence(rng.randrange(1, 40), kv) for _ in range(7)]
    run = _start(seqs, kv)
    batch = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
    tables, inputs = DeviceTables(CPU), run.inputs
    for _ in range(45):
        _go_on(seqs, kv)  # so that the sequences show what the run is ahead of
        expected = StepBuilder(BLOCK_SIZE, 100, num_groups=len(windows)).build(batch)
        for name in ("positions", "slots", "query_starts", "seq_lens", "logits_rows", "table_width"):
            assert np.array_equal(getattr(inputs, name), getattr(expected, name)), name
        assert inputs.sampling.positions.tolist() == [seq.num_tokens for seq in seqs]
        tables.change(inputs.table_changes)
        for row, seq in enumerate(seqs):
            for group, table in enumerate(seq.block_tables):
                found, first = tables.read(inputs)[group, row].tolist(), seq.num_released_blocks[group]
                assert found[first : len(table)] == table[first:]  # blocks behind a window are not read any more
                assert not any(found[len(table) :])
        assert run.is_of(batch)
        inputs = run.advance()
        assert inputs is not None


def test_tables_are_told_of_the_blocks_that_are_entered_and_of_no_others() -> None:
    kv = KVCacheManager(100, BLOCK_SIZE)
    seqs = [_sequence(5, kv), _sequence(6, kv)]
    run = _start(seqs, kv)
    run._builder.launched()
    num_entries = []
    for _ in range(8):
        _go_on(seqs, kv)
        num_entries.append(len(run.advance().table_changes.entries))
        run._builder.launched()
    assert sum(num_entries) == 4  # each of the two entered two blocks
    assert max(num_entries) == 1


@pytest.mark.parametrize(("max_tokens", "num_steps"), [(2, 0), (3, 1), (6, 4), (1000, MAX_MODEL_LEN - 10 - 2)])
def test_no_step_is_launched_past_what_may_be_a_sequence_s_last_token(max_tokens: int, num_steps: int) -> None:
    kv = KVCacheManager(300, BLOCK_SIZE)
    seqs = [_sequence(9, kv), _sequence(10, kv, max_tokens)]
    run = _start(seqs, kv)
    num_advances = 0
    while True:
        _go_on(seqs, kv)
        if not run.advance():
            break
        num_advances += 1
    assert num_advances == num_steps


def test_where_memory_is_short_nothing_changes() -> None:
    kv = KVCacheManager(5, BLOCK_SIZE)  # one of them reserved
    seqs = [_sequence(3, kv), _sequence(3, kv), _sequence(2, kv)]
    run = _start(seqs, kv)
    _go_on(seqs, kv)
    before = run.inputs
    assert not run.advance()  # the first two need a block each, and there is one
    assert run.inputs is before
    assert [len(seq.block_table) for seq in seqs] == [1, 1, 1]
    assert kv.pool.num_free == 1


def test_a_run_is_of_the_same_sequences_in_the_same_order() -> None:
    kv = KVCacheManager(100, BLOCK_SIZE)
    seqs = [_sequence(5, kv), _sequence(6, kv)]
    run = _start(seqs, kv)
    plan = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
    assert run.is_of(plan)
    assert not run.is_of(plan[::-1])
    assert not run.is_of(plan[:1])
    assert not run.is_of([*plan, Scheduled(_sequence(3, kv), 3, 0, samples=True)])
