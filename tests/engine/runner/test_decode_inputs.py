"""Steps of the same sequences, one after the other: the same numbers as if they were gathered anew each time."""

import random

import numpy as np
import pytest

from engine.batch.block_tables import BlockTables
from engine.batch.forward_batch import gather_numbers
from engine.kv_cache.manager import KVCacheManager
from engine.runner.decode_inputs import DecodeRun, make_room
from engine.types import Request, SamplingParams, Scheduled, Sequence

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
    assert make_room(seqs, kv)
    return DecodeRun(seqs, kv=kv, tables=BlockTables())


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_has_the_numbers_of_each_step(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    kv = KVCacheManager(300, BLOCK_SIZE, windows=[window])
    seqs = [_sequence(rng.randrange(1, 40), kv) for _ in range(7)]
    run = _start(seqs, kv)
    batch = run.items
    tables = BlockTables()
    for _ in range(45):
        _go_on(seqs, kv)  # so that the sequences show what the run is ahead of
        expected = gather_numbers(batch, BLOCK_SIZE, tables)
        found = run.numbers
        for name in ("positions", "slots", "query_starts", "seq_lens", "logits_rows"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
        assert run.sampled_positions.tolist() == [seq.num_tokens for seq in seqs]
        for row, seq in enumerate(seqs):  # blocks behind a window are not read any more
            assert (
                found.block_tables[row, seq.num_released_blocks[0] :].tolist()[: len(seq.block_table)]
                == [
                    *seq.block_table[seq.num_released_blocks[0] :],
                    *[0] * (found.block_tables.shape[1] - len(seq.block_table)),
                ][: len(seq.block_table)]
            )
        assert run.is_of([Scheduled(seq, 1, 0, samples=True) for seq in seqs])
        assert run.advance()


def test_who_changes_the_tables_makes_other_numbers() -> None:
    kv = KVCacheManager(100, BLOCK_SIZE)
    seqs = [_sequence(5, kv), _sequence(6, kv)]
    run = _start(seqs, kv)
    seen = [run.numbers]
    for _ in range(8):
        _go_on(seqs, kv)
        before = run.numbers.block_tables.copy()
        assert run.advance()
        assert (run.numbers is seen[-1]) == np.array_equal(before, run.numbers.block_tables)
        seen.append(run.numbers)
    assert len({id(numbers) for numbers in seen}) == 5  # each of the two entered two blocks


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
    before = run.numbers.positions.tolist()
    assert not run.advance()  # the first two need a block each, and there is one
    assert run.numbers.positions.tolist() == before
    assert [len(seq.block_table) for seq in seqs] == [1, 1, 1]
    _go_on(seqs, kv)
    assert not make_room(seqs, kv)
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
