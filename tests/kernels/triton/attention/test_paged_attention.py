"""Paged attention in Triton against its definition, on random mixes of prompt chunks, decoding and drafts."""

import math
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference.attention import paged_attention as definition
from kernels.reference.attention import store_kv as define_store
from kernels.triton.attention.paged_attention import Prepared, paged_attention
from kernels.triton.attention.work_partition import Workspace, partition_attention
from kernels.triton.configs import AttentionConfig
from kernels.triton.layers.store_kv import store_kv

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = AttentionConfig(split_size=64, max_split_queries=8, decode_keys=32, prompt_rows=32, prompt_keys=32)
MIX = [(1, 1), (1, 130), (5, 70), (20, 20), (13, 90), (1, 64)]  # new tokens, all tokens


def make_cache(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values, or their scales, that are all NaN. shape: [num_blocks, num_kv_heads, 2, block_size, head_dim]"""
    if dtype.itemsize > 1:
        return torch.full(shape, math.nan, dtype=dtype).unbind(2), ()
    *outer, block_size, head_dim = shape
    memory = torch.full((*outer, block_size * (head_dim + 4)), 255, dtype=torch.uint8)
    codes, scales = memory.split([block_size * head_dim, block_size * 4], dim=-1)
    codes = codes.view(dtype).unflatten(-1, (block_size, head_dim))
    return codes.unbind(2), scales.view(torch.float32).unbind(2)


@dataclass
class Case:
    """A cache that holds NaN wherever no sequence has a token, and one step's batch over it."""

    lens: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    codes: torch.dtype | None = None  # that the cache keeps, instead of the queries' type
    trees: dict[int, list[int]] = field(default_factory=dict)  # parents of the drafts of some sequences
    features: dict[str, object] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_blocks = sum(-(-length // self.block_size) for _, length in self.lens) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (num_blocks, self.num_kv_heads, 2, self.block_size, self.head_dim)
        self.kv, self.scales = make_cache(shape, self.codes or self.dtype)
        width = max(-(-length // self.block_size) for _, length in self.lens)
        self.tables = torch.zeros(len(self.lens), width, dtype=torch.int64)
        for table, (_, length) in zip(self.tables, self.lens, strict=True):
            blocks = [order.pop() for _ in range(0, length, self.block_size)]
            table[: len(blocks)] = torch.tensor(blocks)
            token = torch.arange(length)
            slots = table[token // self.block_size] * self.block_size + token % self.block_size
            k, v = (torch.randn(length, *shape[1::3], generator=generator).to(self.dtype) for _ in range(2))
            define_store(k, v, *self.kv, slots, *self.scales)
        num_new = torch.tensor([new for new, _ in self.lens])
        self.starts = torch.cat((torch.zeros(1, dtype=torch.int64), num_new.cumsum(0)))
        self.seq_lens = torch.tensor([length for _, length in self.lens])
        self.q = torch.randn(int(self.starts[-1]), self.num_heads, self.head_dim, generator=generator).to(self.dtype)
        if self.trees:
            self._grow()

    def _grow(self) -> None:
        mask = torch.zeros(len(self.q), max(new for new, _ in self.lens), dtype=torch.bool)
        depths = torch.zeros(len(self.q), dtype=torch.int64)
        for b, (new, length) in enumerate(self.lens):
            rows = slice(int(self.starts[b]), int(self.starts[b]) + new)
            mask[rows, :new] = torch.ones(new, new).tril().bool()
            depths[rows] = torch.arange(length - new, length)
            parents = self.trees.get(b, [])
            root = new - len(parents) - 1
            for i, parent in enumerate(parents):
                row = rows.start + root + 1 + i
                above = rows.start + root + 1 + parent
                mask[row] = mask[above]
                mask[row, root + 1 + i] = True
                depths[row] = depths[above] + 1
        self.features |= {"tree_mask": mask, "positions": depths}

    def run(self, device: torch.device, chosen: list[int] | None = None) -> list[Tensor]:
        """The rows of each chosen sequence, run as one batch."""
        chosen = list(range(len(self.lens))) if chosen is None else chosen
        rows = torch.cat([torch.arange(self.starts[b], self.starts[b + 1]) for b in chosen])
        num_new = torch.tensor([self.lens[b][0] for b in chosen])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), num_new.cumsum(0)))
        features = dict(self.features)
        for name in {"tree_mask", "positions"} & features.keys():
            features[name] = features[name][rows]
        partition = partition_attention(
            num_new.numpy(),
            self.seq_lens[chosen].numpy(),
            group=self.num_heads // self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            config=SMALL,
            device=device,
        )
        tensors = [self.q[rows], self.kv[0], self.kv[1], self.tables[chosen], starts, self.seq_lens[chosen]]
        features |= self.named_scales
        features = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in features.items()}
        prepared = Prepared(partition, SMALL, Workspace(0, 0, device))
        out = paged_attention(*(x.to(device) for x in tensors), 0.17, **features, prepared=prepared)
        return list(out.cpu().split(num_new.tolist()))

    @property
    def named_scales(self) -> dict[str, Tensor]:
        return dict(zip(("k_scales", "v_scales"), self.scales, strict=False))

    def check(self, device: torch.device) -> None:
        wide = {name: x.double() if name == "sinks" else x for name, x in self.features.items()}
        expected = definition(
            self.q.double(), *self.kv, self.tables, self.starts, self.seq_lens, 0.17, **wide, **self.named_scales
        )
        found = torch.cat(self.run(device)).double()
        tolerance = TOLERANCES[self.dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_mixed_batch_attends_as_defined(device: torch.device, dtype: torch.dtype) -> None:
    Case(MIX, dtype=dtype).check(device)


CODES = (torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_codes_are_read_as_they_are(device: torch.device, codes: torch.dtype, dtype: torch.dtype) -> None:
    Case(MIX, dtype=dtype, codes=codes).check(device)
    Case([(1, 70), (17, 40)], 3, 1, 80, block_size=4, dtype=dtype, codes=codes).check(device)


@pytest.mark.parametrize("codes", CODES)
def test_codes_behind_windows_and_in_trees(device: torch.device, codes: torch.dtype) -> None:
    Case(MIX, codes=codes, features={"window": 7, "soft_cap": 1.5, "sinks": torch.tensor([0.0, 1.0, 2.0, -3.0])}).check(
        device
    )
    trees = {1: [-1, -1, 0, 0], 2: [-1, 0, -1, 2, 2, 1], 3: [-1, 0, 1]}
    lens = [(1, 33), (5, 66), (7, 130), (14, 40), (20, 20)]
    for window in (None, 40):
        Case(lens, codes=codes, trees=trees, features={"window": window}).check(device)


HEADS = {64: (3, 1), 80: (4, 4), 96: (7, 1), 128: (8, 2), 256: (2, 1)}


@pytest.mark.parametrize(("head_dim", "heads"), HEADS.items())
def test_every_head_size_and_group(device: torch.device, head_dim: int, heads: tuple[int, int]) -> None:
    lens = [(1, 70), (17, 40)]
    Case(lens, *heads, head_dim=head_dim, dtype=torch.float16).check(device)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_every_block_size(device: torch.device, block_size: int) -> None:
    Case([(1, 70), (17, 40)], block_size=block_size).check(device)


@pytest.mark.parametrize("window", [1, 7, 70])
def test_a_window_hides_what_lies_further_back(device: torch.device, window: int) -> None:
    Case(MIX, features={"window": window}).check(device)


def test_soft_cap_and_sinks(device: torch.device) -> None:
    sinks = torch.tensor([-30.0, 0.0, 2.0, 40.0])
    Case(MIX, features={"soft_cap": 1.5}).check(device)
    Case(MIX, features={"sinks": sinks}).check(device)
    Case(MIX, features={"soft_cap": 1.5, "sinks": sinks, "window": 30}).check(device)


@pytest.mark.parametrize("window", [None, 3, 40])
def test_drafts_see_the_context_and_their_ancestors(device: torch.device, window: int | None) -> None:
    trees = {1: [-1, -1, 0, 0], 2: [-1, 0, -1, 2, 2, 1], 3: [-1, 0, 1]}
    lens = [(1, 33), (5, 66), (7, 130), (14, 40), (20, 20)]
    Case(lens, trees=trees, features={"window": window}).check(device)


def test_memory_behind_a_window_is_not_read(device: torch.device) -> None:
    """The blocks that a window left behind belong to others by now, or hold NaN."""
    case = Case([(1, 100), (20, 120)], features={"window": 10})
    expected = torch.cat(case.run(device))
    case.tables[0, :5] = 0
    case.tables[1, :5] = 0
    for cache in case.kv:
        cache[0] = math.nan
    assert 0 not in case.tables[:, 5:][case.tables[:, 5:] != 0].tolist()
    assert torch.equal(torch.cat(case.run(device)), expected)


@pytest.mark.parametrize("features", [{}, {"window": 45, "sinks": torch.zeros(4)}])
def test_neighbours_never_change_a_bit(device: torch.device, features: dict[str, object]) -> None:
    lens = [(1, 130), (5, 70), (20, 20), (4, 200)]
    case = Case(lens, trees={3: [-1, -1, 0]}, features=features)
    plain = Case(lens, features=dict(features))
    together = case.run(device)
    order = [2, 0, 3, 1]
    for b, rows in zip(order, case.run(device, order), strict=True):
        assert torch.equal(rows, together[b])
    for b in range(3):  # not even whether there is a tree among them
        assert torch.equal(plain.run(device, [b])[0], together[b])


def test_drafts_and_chunks_that_go_the_split_way_leave_rows_as_they_are(device: torch.device) -> None:
    """One row at a time, or with the rows after it as drafts: the same bits. Strict determinism rests on this."""
    whole = Case([(6, 131)])
    rows = whole.run(device)[0]
    for i in range(6):
        one = Case([(6, 131)])
        one.lens, one.starts = [(1, 126 + i)], torch.tensor([0, 1])
        one.q, one.seq_lens = whole.q[i : i + 1], torch.tensor([126 + i])
        # numpy's products, unlike the GPU's, depend in the last bit on a row's place among the others
        tolerance = 0.0 if device.type == "cuda" else 1e-6
        torch.testing.assert_close(one.run(device)[0], rows[i : i + 1], rtol=tolerance, atol=tolerance)


def test_the_number_of_programs_never_changes_a_bit(device: torch.device) -> None:
    """A CUDA graph is captured once, for all lengths."""
    case = Case([(2, 250)])
    arguments = (case.q, case.kv[0], case.kv[1], case.tables, case.starts, case.seq_lens)
    outs = []
    for num_programs in (1, 3, 9):
        partition = partition_attention(
            case.starts.diff().numpy(), case.seq_lens.numpy(), group=2, num_kv_heads=2, config=SMALL, device=device
        )
        chunks = tuple(replace(chunk, num_programs=num_programs) for chunk in partition.split_chunks)
        partition = replace(partition, split_chunks=chunks)
        prepared = Prepared(partition, SMALL, Workspace(0, 0, device))
        outs.append(paged_attention(*(x.to(device) for x in arguments), 0.2, prepared=prepared))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_queries_whose_partials_do_not_fit_into_memory_together_are_done_in_chunks(device: torch.device) -> None:
    """Where the split kernel computes all, a long prompt may have more partials than fit: chunks change no bit."""
    case = Case([(1, 250), (20, 20), (8, 130), (7, 200)])
    arguments = (case.q, case.kv[0], case.kv[1], case.tables, case.starts, case.seq_lens)
    config = replace(SMALL, decode_rows=8)  # four queries per tile
    outs, num_partials = [], []
    for max_partials in (1, 30, 56):
        partition = partition_attention(
            case.starts.diff().numpy(), case.seq_lens.numpy(), group=2, num_kv_heads=2, config=config, device=device,
            max_partials=max_partials,
        )  # fmt: skip
        prepared = Prepared(partition, config, Workspace(0, 0, device))
        outs.append(paged_attention(*(x.to(device) for x in arguments), 0.2, prepared=prepared))
        num_partials.append([one.num_partials for one in partition.split_chunks])
    assert num_partials == [[4, 12, 12, 16, 12], [28, 28], [56]]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])


def test_every_part_of_a_partition_begins_where_triton_need_not_compile_anew(device: torch.device) -> None:
    for lens in ([(1, 9)], [(1, 300), (3, 70), (20, 20)], [(30, 40), (30, 90), (30, 30), (5, 500)]):
        query_lens, seq_lens = np.array(lens).T
        partition = partition_attention(
            query_lens, seq_lens, group=2, num_kv_heads=2, config=SMALL, device=device, max_partials=20
        )
        parts = [partition.prompt_tiles]
        for chunk in partition.split_chunks:
            parts += [chunk.tiles, chunk.queries, chunk.partial_starts]
        first = min(part.data_ptr() for part in parts)
        assert all((part.data_ptr() - first) % 16 == 0 for part in parts)


def test_random_batches_attend_as_defined(device: torch.device) -> None:
    rng = random.Random(7)
    for seed in range(6):
        seq_lens = [rng.randrange(1, 150) for _ in range(3)]
        lens = [(min(rng.choice([1, 3, 11]), length), length) for length in seq_lens]
        Case(lens, seed=seed, num_heads=6, features={"window": rng.choice([None, 20])}).check(device)


def test_plain_call_copies_the_lengths_itself(device: torch.device) -> None:
    case = Case([(1, 20), (18, 30)])
    tensors = (case.q, case.kv[0], case.kv[1], case.tables, case.starts, case.seq_lens)
    out = paged_attention(*(x.to(device) for x in tensors), 0.3)
    torch.testing.assert_close(out.cpu(), definition(*tensors, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 64), (3, 80)])
def test_keys_and_values_go_to_their_slots(
    device: torch.device, dtype: torch.dtype, num_kv_heads: int, head_dim: int
) -> None:
    heads = torch.randn(5, 2 + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    _, k, v = heads.split([2, num_kv_heads, num_kv_heads], dim=1)
    slots = torch.tensor([3, 37, 0, 16, 21], device=device)
    found, expected = (torch.zeros(2, 4, num_kv_heads, 16, head_dim, device=device, dtype=dtype) for _ in range(2))
    store_kv(k, v, found[0], found[1], slots)
    define_store(k, v, expected[0], expected[1], slots)
    assert torch.equal(found, expected)


def test_padding_has_no_slot(device: torch.device) -> None:
    k = torch.ones(2, 1, 16, device=device)
    cache = torch.zeros(2, 2, 1, 4, 16, device=device)
    store_kv(k, k, cache[0], cache[1], torch.tensor([-1, 5], device=device))
    assert cache[0, :, 0].flatten(0, 1).sum(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("codes", CODES)
def test_codes_and_scales_go_to_their_slots(device: torch.device, codes: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 3, 20) * torch.logspace(-6, 6, 6)[:, None, None]
    k[2, 1], k[3, 0, 0], v[4, 2, 19] = 0.0, math.nan, math.inf
    slots = torch.tensor([5, 0, 19, 2, 11, 10])
    found, expected = (make_cache((5, 3, 2, 4, 20), codes) for _ in range(2))
    define_store(k, v, *expected[0], slots, *expected[1])
    store_kv(k.to(device), v.to(device), *found[0], slots.to(device), *found[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        if codes == torch.int8:  # 1 where a quotient that rounds otherwise lies between two
            assert (ours.int() - theirs.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-3, atol=2**-9, equal_nan=True)
        assert (ours.view(torch.int8) == theirs.view(torch.int8)).float().mean() > 0.99
