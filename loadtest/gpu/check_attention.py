"""Paged attention and the writing of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kernels.reference.attention
from kernels.triton.layers.store_kv import store_kv
from loadtest.gpu.attention_case import Heads, Lens, make_case, tree_options
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.records import Check, Record

_LLAMA = Heads(32, 8, 128)
_HEADS = [Heads(9, 3, 64), Heads(32, 32, 80), Heads(14, 2, 96), _LLAMA, Heads(8, 4, 256)]
_DECODE: Lens = [(1, 1), (1, 257), (1, 4096), (1, 777)]
_PROMPTS: Lens = [(300, 300), (129, 1000), (17, 40), (2048, 2048)]
_MIX: Lens = [(1, 130), (5, 1070), (300, 300), (33, 2048), (1, 64)]
_DRAFTS: Lens = [(7, 7), (9, 1030), (40, 170), (7, 640)]
_TREE = [-1, 0, -1, 2, 2, 1]


def jobs(context: Context) -> list[Job]:
    if context.is_rehearsal:
        small, mix = Heads(2, 1, 16), [(1, 20), (17, 17)]
        cases: list[tuple[str, Heads, Lens]] = [("mixed", small, mix)]
        drafts, dtypes, heads_of_variants = [(7, 20)], [torch.float32], small
    else:
        batches = {"decode": _DECODE, "prompts": _PROMPTS, "mixed": _MIX}
        cases = [(name, heads, lens) for heads in _HEADS for name, lens in batches.items()]
        drafts, dtypes, heads_of_variants, mix = _DRAFTS, list(BOUNDS), _LLAMA, _MIX
    found = []
    for name, heads, lens in cases:
        for dtype in dtypes:
            title = f"attention, {name}, {heads}, {name_of(dtype)}"
            found.append(Job(title, partial(_attend, context, title, heads, lens, dtype)))
    for name, options in _variants(heads_of_variants, context.device).items():
        title = f"attention, {name}, {heads_of_variants}"
        found.append(Job(title, partial(_attend, context, title, heads_of_variants, mix, dtypes[-1], **options)))
    for window in (None, 40):
        title = f"attention, draft trees{'' if window is None else ' in a window'}, {heads_of_variants}"
        options = tree_options(drafts, _TREE, context.device) | ({} if window is None else {"window": window})
        found.append(Job(title, partial(_attend, context, title, heads_of_variants, drafts, dtypes[-1], **options)))
    for num_rows in (1, 4):
        lens = [(num_rows, length) for _, length in mix]
        title = f"attention as in a CUDA graph, {num_rows} rows each, {heads_of_variants}"
        found.append(Job(title, partial(_attend_any_lengths, context, title, heads_of_variants, lens, dtypes[-1])))
    title = "attention, the same bits alone and in a batch"
    found.append(Job(title, partial(_compare_bits, context, title, heads_of_variants, mix, dtypes[-1])))
    return [*found, Job("store", partial(_store, context, dtypes))]


def _variants(heads: Heads, device: torch.device) -> dict[str, dict[str, Tensor | float | int]]:
    sinks = torch.linspace(-30.0, 20.0, heads.num_heads, device=device)
    return {
        "window of 7": {"window": 7},
        "window of 1000": {"window": 1000},
        "soft cap": {"soft_cap": 30.0},
        "sinks": {"sinks": sinks},
        "window, soft cap and sinks": {"window": 100, "soft_cap": 5.0, "sinks": sinks},
    }


def _attend(
    context: Context, name: str, heads: Heads, lens: Lens, dtype: torch.dtype, **options: Tensor | float | int
) -> Iterator[Record]:
    case = make_case(heads, lens, dtype, context.generator(name), **options)
    prepared = case.prepare()
    with poisoned_memory():
        found = case.run(prepared)
    yield Check(name, relative_error(found, case.expected()), BOUNDS[dtype])


def _attend_any_lengths(context: Context, name: str, heads: Heads, lens: Lens, dtype: torch.dtype) -> Iterator[Record]:
    """The same bits as where the lengths were known when the work was cut."""
    case = make_case(heads, lens, dtype, context.generator(name))
    expected = case.run(case.prepare())
    with poisoned_memory():
        found = case.run(case.prepare_any_lengths())
    yield Check(name, float((found != expected).sum()), 0.0)


def _compare_bits(context: Context, name: str, heads: Heads, lens: Lens, dtype: torch.dtype) -> Iterator[Record]:
    """What a request says must not depend on who is in the batch with it."""
    case = make_case(heads, lens, dtype, context.generator(name))
    together = case.run(case.prepare())
    num_different = 0
    for row in range(len(lens)):
        rows = slice(int(case.query_starts[row]), int(case.query_starts[row + 1]))
        alone = type(case)(
            heads,
            [lens[row]],
            case.q[rows],
            case.k_cache,
            case.v_cache,
            case.block_tables[row : row + 1],
            case.query_starts[row : row + 2] - case.query_starts[row],
            case.seq_lens[row : row + 1],
        )
        num_different += int((alone.run(alone.prepare()) != together[rows]).sum())
    yield Check(name, float(num_different), 0.0)


def _store(context: Context, dtypes: list[torch.dtype]) -> Iterator[Record]:
    generator, device = context.generator("store"), context.device
    for dtype in dtypes:
        for num_kv_heads, head_dim in ((8, 128), (3, 80)):
            k, v = torch.randn(2, 50, num_kv_heads, head_dim, device=device, generator=generator).to(dtype)
            slots = torch.randperm(20 * 16, device=device, generator=generator)[:50]
            shape = (2, 20, num_kv_heads, 16, head_dim)
            found, expected = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            store_kv(k, v, found[0], found[1], slots)
            kernels.reference.attention.store_kv(k, v, expected[0], expected[1], slots)
            name = f"store, {num_kv_heads} heads of {head_dim}, {name_of(dtype)}"
            yield Check(name, float((found != expected).sum()), 0.0)
