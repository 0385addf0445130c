"""What the attention layers of a model keep in the KV cache, how they attend, and which of them share block tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

MAX_GROUPS = 8  # block tables of a sequence
MAX_PADDING = 0.15  # of the memory of all layers, for which groups are not all of one size


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What an attention layer asks of its back end. group: whose block table it reads, see `group_layers`"""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query sees itself and the `window - 1` tokens before it
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)
    group: int = 0


def group_layers(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The layers with their groups: those of a group have one window, and all groups take about the same memory.

    A block of the cache holds some tokens of one group, and all blocks are of one size. So kinds that differ in number
    are cut into groups of so many layers that the least memory is padding: of 26 layers, 4 of which see the whole text,
    become 7 groups of up to four. Where more than `MAX_PADDING` were lost or more than `MAX_GROUPS` needed, all layers
    are one group, which keeps what any of them sees.
    """
    kinds: dict[int | None, list[AttentionLayer]] = {}
    for layer in layers:
        kinds.setdefault(layer.window, []).append(layer)
    if len(kinds) == 1:
        return list(layers)
    cuts = [[part for kind in kinds.values() for part in _parts(kind, size)] for size in range(1, len(layers))]
    fitting = [cut for cut in cuts if len(cut) <= MAX_GROUPS]
    best = min(fitting, key=lambda cut: (_padded(cut), len(cut)), default=[])
    if not best or _padded(best) > (1 + MAX_PADDING) * sum(map(_elements, layers)):
        return list(layers)
    groups = {layer.index: group for group, part in enumerate(best) for layer in part}
    return [replace(layer, group=groups[layer.index]) for layer in layers]


def windows_of(layers: Sequence[AttentionLayer]) -> list[int | None]:
    """The window of each group: the longest of its layers'; None where one of them sees the whole text."""
    windows: list[list[int | None]] = [[] for _ in range(1 + max(layer.group for layer in layers))]
    for layer in layers:
        windows[layer.group].append(layer.window)
    bounded = [[window for window in of_group if window is not None] for of_group in windows]
    return [max(some) if len(some) == len(all_) else None for some, all_ in zip(bounded, windows, strict=True)]


def _parts(layers: list[AttentionLayer], size: int) -> list[list[AttentionLayer]]:
    remaining = iter(layers)
    return [list(islice(remaining, size)) for _ in range(-(-len(layers) // size))]


def _padded(groups: list[list[AttentionLayer]]) -> int:
    """What a token takes in all groups if each is as large as the largest."""
    return len(groups) * max(sum(map(_elements, group)) for group in groups)


def _elements(layer: AttentionLayer) -> int:
    return layer.num_kv_heads * layer.head_dim
