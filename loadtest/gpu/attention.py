"""Paged attention and the writing of keys and values: against the definition, and against others in Llama's heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Unpack

import torch

import kernels.reference.attention
from kernels.triton.layers.store_kv import store_kv
from loadtest.gpu.attention_case import Heads, Lens, Options, make_case, tree_options
from loadtest.gpu.attention_peers import PEERS, Attend
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.quantized import FIRST_FP8
from loadtest.gpu.records import Check, Problem, Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

LLAMA = Heads(32, 8, 128)
_HEADS = [Heads(9, 3, 64), Heads(32, 32, 80), Heads(14, 2, 96), LLAMA, Heads(8, 4, 256)]
_DECODE: Lens = [(1, 1), (1, 257), (1, 4096), (1, 777)]
_PROMPTS: Lens = [(300, 300), (129, 1000), (17, 40), (2048, 2048)]
_MIX: Lens = [(1, 130), (5, 1070), (300, 300), (33, 2048), (1, 64)]
_DRAFTS: Lens = [(7, 7), (9, 1030), (40, 170), (7, 640)]
_TREE = [-1, 0, -1, 2, 2, 1]
DECODES = [(1, 4096), (8, 4096), (32, 1024), (32, 4096), (128, 1024), (128, 4096), (8, 16384)]
PROMPTS = [(1, 1024), (1, 4096), (4, 4096), (1, 16384)]
_AGREEMENT = 0.02  # relative error between two implementations in bfloat16


def checks(context: Context) -> list[Job]:
    if context.is_rehearsal:
        small, mix = Heads(2, 1, 16), [(1, 20), (17, 17)]
        cases: list[tuple[str, Heads, Lens]] = [("mixed", small, mix)]
        drafts, dtypes, heads_of_variants = [(7, 20)], [torch.float32], small
    else:
        batches = {"decode": _DECODE, "prompts": _PROMPTS, "mixed": _MIX}
        cases = [(name, heads, lens) for heads in _HEADS for name, lens in batches.items()]
        drafts, dtypes, heads_of_variants, mix = _DRAFTS, list(BOUNDS), LLAMA, _MIX
    found = []
    for name, heads, lens in cases:
        for dtype in dtypes:
            title = f"attention, {name}, {heads}, {name_of(dtype)}"
            found.append(Job(title, partial(_attend, context, title, heads, lens, dtype)))
    for name, options in _variants(heads_of_variants, context.device).items():
        title = f"attention, {name}, {heads_of_variants}"
        found.append(Job(title, partial(_attend, context, title, heads_of_variants, mix, dtypes[-1], **options)))
    for codes in _codes(context):
        title = f"attention over a cache of {name_of(codes)}, {heads_of_variants}"
        work = partial(_attend, context, title, heads_of_variants, mix, dtypes[-1], codes=codes)
        found.append(Job(title, work))
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


def _variants(heads: Heads, device: torch.device) -> dict[str, Options]:
    sinks = torch.linspace(-30.0, 20.0, heads.num_heads, device=device)
    return {
        "window of 7": {"window": 7},
        "window of 1000": {"window": 1000},
        "soft cap": {"soft_cap": 30.0},
        "sinks": {"sinks": sinks},
        "window, soft cap and sinks": {"window": 100, "soft_cap": 5.0, "sinks": sinks},
    }


def _codes(context: Context) -> list[torch.dtype]:
    """Those of a cache of 8 bits that this chip reads."""
    is_cuda = context.device.type == "cuda"
    has_fp8 = not is_cuda or torch.cuda.get_device_capability(context.device) >= FIRST_FP8
    return [torch.int8, *([torch.float8_e4m3fn] if has_fp8 else [])]


def _attend(
    context: Context,
    name: str,
    heads: Heads,
    lens: Lens,
    dtype: torch.dtype,
    *,
    codes: torch.dtype | None = None,
    **options: Unpack[Options],
) -> Iterator[Record]:
    case = make_case(heads, lens, dtype, context.generator(name), codes=codes, **options)
    prepared = case.prepare()
    with poisoned_memory():
        found = case.run(prepared)
    yield Check(name, relative_error(found, case.expected()), BOUNDS[dtype])


def _attend_any_lengths(context: Context, name: str, heads: Heads, lens: Lens, dtype: torch.dtype) -> Iterator[Record]:
    """Checks that a graph-safe partition gives the same bits as a partition for the known lengths."""
    case = make_case(heads, lens, dtype, context.generator(name))
    expected = case.run(case.prepare())
    with poisoned_memory():
        found = case.run(case.prepare_any_lengths())
    yield Check(name, float((found != expected).sum()), 0.0)


def _compare_bits(context: Context, name: str, heads: Heads, lens: Lens, dtype: torch.dtype) -> Iterator[Record]:
    """Checks that a sequence's result has the same bits alone and in a batch."""
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
            {},
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


def timings(context: Context) -> list[Job]:
    decodes, prompts, heads = DECODES, PROMPTS, LLAMA
    if context.is_rehearsal:
        decodes, prompts, heads = [(2, 40)], [(1, 24)], Heads(2, 1, 16)
    cases = _cases(decodes, prompts)
    found = [Job(name, partial(_time, context, name, heads, lens)) for name, lens in cases.items()]
    some = cases if context.is_rehearsal else _cases([(32, 4096), (128, 1024)], [(1, 4096)])
    for codes in _codes(context):
        for name, lens in some.items():
            title = f"{name}, a cache of {name_of(codes)}"
            found.append(Job(title, partial(_time_codes, context, title, heads, lens, codes)))
    return found


def _cases(decodes: list[tuple[int, int]], prompts: list[tuple[int, int]]) -> dict[str, Lens]:
    """The cases by name. Pairs: number of sequences, tokens of each."""
    found: dict[str, Lens] = {}
    for batch, length in decodes:
        found[f"decode attention, {batch} x {length}"] = [(1, length)] * batch
    for batch, length in prompts:
        found[f"prefill attention, {batch} x {length}"] = [(length, length)] * batch
    return found


def _time(context: Context, name: str, heads: Heads, lens: Lens) -> Iterator[Record]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    first = make_case(heads, lens, dtype, context.generator(name))
    count = min(4 if context.is_rehearsal else 64, num_sets(first.num_bytes, l2_bytes(context.device)))
    more = [make_case(heads, lens, dtype, context.generator(f"{name} {i}")) for i in range(1, count)]
    cases = [first, *more]
    ours: list[Attend] = [partial(case.run, case.prepare()) for case in cases]
    works = {"": _in_turn(ours)}
    expected = ours[0]()
    for peer, make in PEERS.items():
        try:
            attends = [make(case) for case in cases]
            error = relative_error(attends[0](), expected)
        except Exception as failure:  # what others raise is theirs; our own figure must not be lost with it
            first_line = next(iter(str(failure).splitlines()), "")
            yield Problem(f"{peer}, {name}", f"{type(failure).__name__}: {first_line[:300]}")
            continue
        if not error <= _AGREEMENT:
            yield Problem(f"{peer}, {name}", f"it disagrees: relative error {error:.2g}")
            continue
        works[peer] = _in_turn(attends)
    seconds = Stopwatch(context.device).compare(works, num_sets=count)
    floor = context.floor(num_bytes=first.num_bytes, num_flops=first.num_flops)
    yield Timing(name, seconds.pop(""), floor, peers=seconds)


def _time_codes(context: Context, name: str, heads: Heads, lens: Lens, codes: torch.dtype) -> Iterator[Record]:
    """Beside the same attention over floats."""
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    count, works, first = 1, dict[str, Work](), None
    for title, kind in ((f"{name_of(dtype)} cache", None), ("", codes)):
        first = make_case(heads, lens, dtype, context.generator(name), codes=kind)
        most = 4 if context.is_rehearsal else 64
        count = max(count, min(most, num_sets(first.num_bytes, l2_bytes(context.device))))
        more = [make_case(heads, lens, dtype, context.generator(f"{name} {i}"), codes=kind) for i in range(1, count)]
        works[title] = _in_turn([partial(case.run, case.prepare()) for case in (first, *more)], len(more) + 1)
    assert first is not None
    seconds = Stopwatch(context.device).compare(works, num_sets=count)
    floor = context.floor(num_bytes=first.num_bytes, num_flops=first.num_flops)
    yield Timing(name, seconds.pop(""), floor, peers=seconds)


def _in_turn(attends: list[Attend], count: int | None = None) -> Work:
    """count: how many there are, where others in the same run have more"""
    return lambda index: attends[index if count is None else index % count]()
