"""The candidates of the tuner: kernels, the cases that they are timed on, and the tile shapes to try."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import kernels.reference.moe
import kernels.triton.layers.moe
from kernels.triton.configs import (
    AttentionConfig,
    MoeConfig,
    QuantizedConfig,
    attention_config,
    chip_of,
    moe_config,
    quantized_config,
)
from kernels.triton.quantized.linear import quantized_linear
from loadtest.gpu.attention_case import AttentionCase, Heads, Lens, Options, make_case, tree_options
from loadtest.gpu.context import Context
from loadtest.gpu.errors import BOUNDS, relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.quantized import random_matrix
from loadtest.gpu.stopwatch import Work, num_sets

Axes = dict[str, tuple[int, ...]]  # fields and the values to try
Config = TypeVar("Config", bound=AttentionConfig | MoeConfig | QuantizedConfig)
IMPOSSIBLE = (OutOfResources, PTXASError, CompilationError, RuntimeError)  # a tile shape that this chip refuses

_DECODE: Axes = {
    "split_size": (256, 512),
    "decode_keys": (32, 64, 128),
    "decode_warps": (2, 4, 8),
    "decode_stages": (3, 5, 7),
}
_PROMPT: Axes = {
    "prompt_rows": (64, 128),
    "prompt_keys": (32, 64, 128),
    "prompt_warps": (4, 8),
    "prompt_stages": (3, 5),
}
_FEW: Axes = {"columns": (32, 64, 128), "step": (64, 128, 256), "stages": (3, 4, 5)}
_MANY: Axes = {
    "rows": (64, 128),
    "columns": (64, 128),
    "step": (64,),
    "warps": (4, 8),
    "stages": (3, 4),
}
_QUANTIZED: dict[str, tuple[Axes, list[int]]] = {  # and numbers of rows to time
    "few": (
        {"columns": (32, 64, 128), "warps": (2, 4, 8), "stages": (3, 4, 6), "programs": (132, 256, 512, 1024)},
        [1, 16],
    ),
    "some": ({"columns": (64, 128), "warps": (4, 8), "stages": (3, 4), "programs": (132, 256, 512)}, [64]),
    "many": ({"rows": (64, 128, 256), "columns": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)}, [256, 4096]),
}
_QUANTIZED_SIZES = ((6144, 4096), (4096, 14336))


@dataclass(frozen=True)
class Load(Generic[Config]):
    """A case that a kernel is timed on, as so many sets of inputs that the cache does not hold them all."""

    run: Callable[[Config], Work]
    num_sets: int


@dataclass(frozen=True)
class Tunable(Generic[Config]):
    """A kernel and an entry of its table.

    check: the relative error of a config's results, those of the variants that
    take most registers and shared memory among them; it may raise one of IMPOSSIBLE
    """

    kernel: str
    keys: list[str]
    base: Config
    axes: Axes
    loads: Callable[[], list[Load[Config]]]
    check: Callable[[Config], float]
    bound: float

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.keys[0]}, {', '.join(self.axes)}"

    def configs(self) -> list[Config]:
        """The configs to try: the base first, then those that differ from it in few fields."""
        values = itertools.product(*self.axes.values())
        fields: Iterator[dict[str, Any]] = (dict(zip(self.axes, value, strict=True)) for value in values)
        found = {replace(self.base, **changes) for changes in fields} - {self.base}
        return [self.base, *sorted(found, key=lambda config: (self._distance(config), str(config)))]

    def _distance(self, config: Config) -> int:
        before, after = asdict(self.base), asdict(config)
        return sum(before[field] != after[field] for field in before)


def tunables(context: Context) -> Iterator[Tunable[Any]]:
    """The kernels to tune, the most important first."""
    if context.is_rehearsal:
        yield _attention(context, Heads(2, 1, 16), {"decode_warps": (2, 4)}, [[(1, 20)]])
        return
    for heads in (Heads(32, 8, 128), Heads(32, 8, 64)):
        yield _attention(context, heads, _DECODE, [[(1, 4096)], [(1, 2048)] * 32, [(1, 1024)] * 128])
        yield _attention(context, heads, _PROMPT, [[(2048, 2048)], [(512, 4096)] * 2])
    for bucket in _QUANTIZED:
        yield _quantized(context, bucket)
    yield _moe(context, "few", _FEW, [1, 32])
    yield _moe(context, "many", _MANY, [2048])


def _attention(context: Context, heads: Heads, axes: Axes, batches: list[Lens]) -> Tunable[AttentionConfig]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    base = attention_config(heads.head_dim, heads.group, dtype, chip=chip_of(context.device))
    generator = context.generator(f"tune {heads} {list(axes)}")

    def load(lens: Lens) -> Load[AttentionConfig]:
        first = make_case(heads, lens, dtype, generator)
        count = 1 if context.is_rehearsal else num_sets(first.num_bytes, l2_bytes(context.device))
        cases = [first, *(make_case(heads, lens, dtype, generator) for _ in range(1, count))]
        return Load(lambda config: _attending(cases, config), count)

    def check(config: AttentionConfig) -> float:
        lens = [(4, 20)] if context.is_rehearsal else [(4, 300), (40, 200), (5, 1500)]
        tree: Options = {**tree_options(lens, [-1, -1, 0], context.device), "window": 100, "soft_cap": 30.0}
        plain: Options = {}
        cases = [make_case(heads, lens, dtype, generator, **options) for options in (plain, tree)]
        return max(relative_error(case.run(case.prepare(config)), case.expected()) for case in cases)

    keys = [f"{heads.head_dim} {name}" for name in ("bfloat16", "float16")]
    return Tunable("attention", keys, base, axes, lambda: [load(lens) for lens in batches], check, BOUNDS[dtype])


def _attending(cases: list[AttentionCase], config: AttentionConfig) -> Work:
    prepared = [case.prepare(config) for case in cases]
    return lambda index: cases[index].run(prepared[index])


def _moe(context: Context, bucket: str, axes: Axes, rows: list[int]) -> Tunable[MoeConfig]:
    num_experts, top_k, hidden_size, size = 64, 8, 2048, 1024
    dtype, device = torch.bfloat16, context.device
    base = moe_config(0 if bucket == "few" else 1 << 20, dtype, chip=chip_of(device))
    generator = context.generator(f"tune moe {bucket}")

    def draw(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(std=sizes[-1] ** -0.5, generator=generator)

    def parts(num_tokens: int) -> tuple[torch.Tensor, ...]:
        routed = kernels.reference.moe.route(draw(num_tokens, num_experts).float(), top_k, normalise=True)
        weights = draw(num_experts, 2 * size, hidden_size), draw(num_experts, hidden_size, size)
        return draw(num_tokens, hidden_size), *weights, *routed

    def load(num_tokens: int) -> Load[MoeConfig]:
        part = parts(num_tokens)  # all experts together are more than the cache holds
        return Load(lambda config: lambda index: kernels.triton.layers.moe.mix_experts(*part, config=config), 1)

    def check(config: MoeConfig) -> float:
        x, gate_up, down, weights, experts = parts(100)
        found = kernels.triton.layers.moe.mix_experts(x, gate_up, down, weights, experts, config=config)
        expected = kernels.reference.moe.mix_experts(x.double(), gate_up.double(), down.double(), weights, experts)
        return relative_error(found, expected)

    keys = [f"{bucket} bfloat16", f"{bucket} float16"]
    return Tunable("moe", keys, base, axes, lambda: [load(num) for num in rows], check, 2 * BOUNDS[dtype])


def _quantized(context: Context, bucket: str) -> Tunable[QuantizedConfig]:
    """With int4 in groups of 128. Other formats take the same tiles: they have as many registers for sums and rows."""
    axes, numbers = _QUANTIZED[bucket]
    dtype, device = torch.bfloat16, context.device
    base = quantized_config(numbers[-1], dtype, chip=chip_of(device))
    generator = context.generator(f"tune quantized {bucket}")

    def load(size: tuple[int, int], num_rows: int) -> Load[QuantizedConfig]:
        first = random_matrix(*size, 4, 128, generator)
        count = num_sets(first.nbytes, l2_bytes(device))
        matrices = [first, *(random_matrix(*size, 4, 128, generator) for _ in range(1, count))]
        x = torch.empty(num_rows, size[1], dtype=dtype, device=device).normal_(generator=generator)
        return Load(lambda config: lambda index: quantized_linear(x, matrices[index], config=config), count)

    def check(config: QuantizedConfig) -> float:
        errors = []
        for group_size, num_rows in ((128, 1), (32, 70)):
            matrix = random_matrix(1000, 1152, 4, group_size, generator)
            x = torch.empty(num_rows, 1152, dtype=dtype, device=device).normal_(generator=generator)
            expected = x.double() @ matrix.dense().double().T
            errors.append(relative_error(quantized_linear(x, matrix, config=config), expected))
        return max(errors)

    keys = [f"{bucket} bfloat16", f"{bucket} float16"]
    loads = [(size, number) for size in _QUANTIZED_SIZES for number in numbers]
    return Tunable("quantized", keys, base, axes, lambda: [load(*one) for one in loads], check, 2 * BOUNDS[dtype])
