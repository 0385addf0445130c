"""A step's tensors: right for any plan, whatever is kept from the steps before."""

import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from engine.batch.block_tables import WIDTH_STEP
from engine.batch.device_inputs import BatchBuilder, DeviceTables, HostStaging, places
from engine.batch.gather import gather_any, gather_step
from engine.batch.step_inputs import KNOWN, SequenceInputs
from engine.kv_cache.manager import KVCacheManager
from engine.runner.executor import input_tokens
from engine.runner.graph_inputs import NO_SLOT, GraphSize, StaticBatch
from engine.runner.step_builder import StepBuilder
from engine.runner.strict_runner import one_token
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.stepping import VOCAB_SIZE, build_forward_batch, step_inputs

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def _sequence(token_ids: list[int], *, logprobs: int | None = None) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=1, logprobs=logprobs)
    return Sequence(Request(request_id="a", prompt_token_ids=token_ids, params=params), token_ids)


class Traffic:
    """Sequences that come, grow, are preempted, come back and go, as a scheduler would have it."""

    def __init__(self, seed: int, windows: list[int | None]) -> None:
        self.rng = random.Random(seed)
        self.kv = KVCacheManager(400 * len(windows), BLOCK_SIZE, windows=windows)
        self.sequences: list[Sequence] = []

    def step(self) -> list[Scheduled]:
        rng, kv = self.rng, self.kv
        for _ in range(rng.choice([0, 0, 1, 1, 9]) if len(self.sequences) < 20 else 0):
            self.sequences.append(_sequence([rng.randrange(1, 99) for _ in range(rng.randrange(1, 90))]))
        for seq in list(self.sequences):
            if rng.random() < 0.08:
                kv.free(seq)  # preempted: it may come back, with the prefix that is still cached
            if rng.random() < 0.04:
                kv.free(seq)
                self.sequences.remove(seq)
        return [self._schedule(seq) for seq in self.sequences if rng.random() < 0.8]

    def _schedule(self, seq: Sequence) -> Scheduled:
        rng, kv = self.rng, self.kv
        if not seq.block_table:
            kv.start(seq, kv.find_prefix(seq))
        num_verified = min(seq.num_tokens - seq.num_computed_tokens, rng.choice([1, 5, 64]))
        samples = seq.num_computed_tokens + num_verified == seq.num_tokens
        num_drafts = rng.choice([0, 0, 3]) if samples else 0
        seq.draft_token_ids = [rng.randrange(1, 99) for _ in range(num_drafts)]
        seq.draft_parents = list(range(-1, num_drafts - 1))
        assert kv.allocate(seq, seq.num_computed_tokens + num_verified + num_drafts)
        return Scheduled(seq, num_verified + num_drafts, num_drafts, samples)

    def update(self, batch: list[Scheduled]) -> None:
        for item in batch:
            item.seq.num_computed_tokens += item.num_new_tokens - item.num_drafts
            if item.samples:
                item.seq.token_ids.append(self.rng.randrange(1, 99))
            self.kv.commit(item.seq)


def _rows(batch: list[Scheduled], num_groups: int) -> list[tuple[int, ...]]:
    """Token, position and the slot in each group of each row, one at a time."""
    rows = []
    for item in batch:
        seq, first = item.seq, item.seq.num_computed_tokens
        num_verified = item.num_new_tokens - item.num_drafts
        tokens = seq.token_ids[first : first + num_verified] + seq.draft_token_ids[: item.num_drafts]
        for position, token in enumerate(tokens, start=first):
            blocks = [seq.block_tables[group][position // BLOCK_SIZE] for group in range(num_groups)]
            rows.append((token, position, *(block * BLOCK_SIZE + position % BLOCK_SIZE for block in blocks)))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_only_decodes_is_gathered_as_any_other(seed: int) -> None:
    """By fewer passes, which have to come to the same."""
    rng, windows = random.Random(seed), [[None], [6, None]][seed % 2]
    kv = KVCacheManager(400 * len(windows), BLOCK_SIZE, windows=windows)
    batch = []
    for _ in range(rng.randrange(1, 9)):
        tokens = [rng.randrange(1, 99) for _ in range(rng.randrange(2, 60))]
        seq = _sequence(tokens, logprobs=rng.choice([None, None, 3]))
        kv.start(seq, kv.find_prefix(seq))
        assert kv.allocate(seq, seq.num_tokens + 1)
        num_ahead = rng.randrange(2)
        seq.num_computed_tokens = seq.num_tokens - 1 - num_ahead
        source = KNOWN if rng.random() < 0.5 else rng.randrange(5)
        batch.append(Scheduled(seq, 1, 0, samples=True, num_ahead=num_ahead, source=source))
    few, many = gather_step(batch, BLOCK_SIZE), gather_any(batch, BLOCK_SIZE)
    for name, part in few._asdict().items():
        other = getattr(many, name)
        if isinstance(part, SequenceInputs):
            assert all(np.array_equal(getattr(part, one.name), getattr(other, one.name)) for one in fields(part)), name
        else:
            assert np.array_equal(part, other), name
            assert getattr(part, "dtype", None) == getattr(other, "dtype", None), name


def test_every_step_of_random_traffic_is_laid_out_right() -> None:
    for seed in range(8):
        windows = [[None], [10], [None, 10], [7, None, 20]][seed % 4]
        num_groups, traffic = len(windows), Traffic(seed, windows)
        inputs, builder = StepBuilder(BLOCK_SIZE, VOCAB_SIZE, num_groups=num_groups), BatchBuilder(CPU)
        for _ in range(60):
            batch = traffic.step()
            if not batch:
                continue
            if traffic.rng.random() < 0.3:  # a step that failed before the tables were changed
                inputs.build(batch)
            made = builder.build(inputs.build(batch))
            inputs.launched()
            columns = (made.input_ids, made.positions, *made.slots)
            assert list(zip(*(column.tolist() for column in columns), strict=True)) == _rows(batch, num_groups)
            starts = np.cumsum([0, *(item.num_new_tokens for item in batch)]).tolist()
            assert made.query_starts.tolist() == made.query_starts_list == starts
            lens = [item.seq.num_computed_tokens + item.num_new_tokens for item in batch]
            assert made.seq_lens.tolist() == made.seq_lens_list == lens
            wanted = [
                end - i for item, end in zip(batch, starts[1:], strict=True) for i in range(item.num_logits, 0, -1)
            ]
            assert made.logits_rows.tolist() == wanted
            for group, found in enumerate(made.block_tables):
                width = found.shape[1]
                assert width % WIDTH_STEP == 0
                tables = [item.seq.block_tables[group] for item in batch]
                assert found.tolist() == [table + [0] * (width - len(table)) for table in tables]
            traffic.update(batch)


def test_the_newest_tokens_may_come_from_the_device() -> None:
    seqs = [_sequence([7, 8, 9]), _sequence([1, 2])]
    for block, seq in enumerate(seqs, start=1):
        seq.num_computed_tokens, seq.block_tables = seq.num_tokens - 1, [[block]]
    batch = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
    ahead = [Scheduled(seq, 1, 0, samples=True, num_ahead=1, source=row) for row, seq in enumerate(seqs)]
    inputs, newest = step_inputs(ahead, BLOCK_SIZE), torch.tensor([30, -1])
    tokens = input_tokens(inputs, newest)
    made = BatchBuilder(CPU).build(inputs, tokens)
    assert made.input_ids.tolist() == [30, 0]  # for the second, none could be chosen
    assert made.positions.tolist() == [3, 2]
    mixed = step_inputs([batch[0], Scheduled(seqs[1], 1, 0, samples=True, num_ahead=1, source=0)], BLOCK_SIZE)
    assert input_tokens(mixed, newest).tolist() == [9, 30]
    assert input_tokens(step_inputs(batch, BLOCK_SIZE), newest) is None  # the host knows all of them
    alone = BatchBuilder(CPU).build(one_token(step_inputs(batch, BLOCK_SIZE), 0))
    expected = build_forward_batch(batch[:1], BLOCK_SIZE, CPU)
    for name in ("positions", "query_starts", "seq_lens", "logits_rows"):
        assert torch.equal(getattr(alone, name), getattr(expected, name))
    assert torch.equal(alone.slots[0], expected.slots[0])
    assert torch.equal(alone.block_tables[0], expected.block_tables[0])
    assert alone.input_ids.tolist() == [9]


def test_what_is_on_its_way_is_not_written_over() -> None:
    staging = HostStaging(CPU)
    first = staging.write((np.arange(5), np.arange(3)))
    second = staging.write((np.full(9, 7),))
    assert first.tolist()[:5] == [0, 1, 2, 3, 4]
    assert second.tolist()[:9] == [7] * 9


def test_parts_begin_at_multiples_of_sixteen_bytes() -> None:
    assert places((1, 2, 3, 4)) == [0, 2, 4, 8, 12]
    staging = HostStaging(CPU)
    parts = (np.array([5]), np.array([6, 7, 8]), np.array([[9, 10], [11, 12]]))
    whole = staging.write(parts)
    target = torch.zeros(20, dtype=torch.int64)
    staging.copy_to(target, whole)
    for start, part in zip(places(tuple(part.size for part in parts)), parts, strict=False):
        assert target[start : start + part.size].tolist() == part.ravel().tolist()


def test_a_static_batch_holds_what_a_fresh_one_holds_and_padding_after_it() -> None:
    """Filled again and again with batches of all sizes: nothing of an earlier one may be seen."""
    static = StaticBatch(40, max_num_seqs=20, max_num_blocks=30, num_groups=2, device=CPU)
    traffic, tables = Traffic(3, [None, 10]), DeviceTables(CPU)
    inputs = StepBuilder(BLOCK_SIZE, VOCAB_SIZE, num_groups=2)
    rng = random.Random(0)
    num_filled = 0
    for _ in range(80):
        batch = [item for item in traffic.step() if item.samples and item.num_new_tokens <= 4][:20]
        num_rows = sum(item.num_new_tokens for item in batch)
        if batch and num_rows <= 40:
            size = GraphSize(rng.randrange(num_rows, 41), rng.randrange(len(batch), 21), 4)
            made = inputs.build(batch)
            tables.change(made.table_changes)
            static.fill(made, tables.read(made), size, None)
            _check(static, size, batch, num_rows)
            num_filled += 1
        traffic.update(batch)
    assert num_filled > 20


def _check(static: StaticBatch, size: GraphSize, batch: list[Scheduled], num_rows: int) -> None:
    made, expected = static.view(size), build_forward_batch(batch, BLOCK_SIZE, CPU)
    for name in ("input_ids", "positions"):
        assert getattr(made, name).tolist()[:num_rows] == getattr(expected, name).tolist()
    for found, slots in zip(made.slots, expected.slots, strict=True):
        assert found.tolist() == slots.tolist() + [NO_SLOT] * (size.num_rows - num_rows)
    assert made.input_ids.tolist()[num_rows:] == [0] * (size.num_rows - num_rows)
    num_padding = size.num_seqs - len(batch)
    assert made.query_starts.tolist() == expected.query_starts.tolist() + [num_rows] * num_padding
    assert made.seq_lens.tolist() == expected.seq_lens.tolist() + [0] * num_padding
    for found, tables in zip(made.block_tables, expected.block_tables, strict=True):
        assert found[: len(batch), : tables.shape[1]].tolist() == tables.tolist()
    assert made.input_ids.data_ptr() == static.view(size).input_ids.data_ptr()
