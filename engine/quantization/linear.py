"""Matrices of a model's layers, each kept by a method of its own: made empty, loaded part by part, multiplied with.

A checkpoint's tensors arrive one at a time. Once the last part of a matrix is there, its method brings it into its
final layout, and the floats are freed: a model is never all floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quantization.stored_levels import StoredLevels, as_floats, floats_of

W = TypeVar("W")
ALL_ROWS = slice(None)


class Part(NamedTuple):
    """Rows of a matrix that checkpoints and adapters have as a matrix of their own."""

    name: str  # as they call it, beside the layer's siblings; empty: the whole matrix, under the layer's name
    num_rows: int


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What is known of a layer before any weight is: its sizes, its parts, and how devices would share it.

    axis: along which a group of devices would cut it, so that no product has to wait: "outputs" before what works on
    each head or element by itself, "inputs" after it, with a sum over the devices; None: not at all
    """

    num_inputs: int
    parts: tuple[Part, ...]
    axis: Literal["outputs", "inputs"] | None = None
    is_output: bool = False  # the products are the logits

    @classmethod
    def of(cls, weight: Tensor, *, is_output: bool = False) -> LinearSpec:
        """Of a whole matrix, [num_outputs, num_inputs]."""
        return cls(weight.shape[1], (Part("", weight.shape[0]),), is_output=is_output)

    @property
    def num_outputs(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    def rows(self, name: str) -> slice:
        """Where a part lies among the outputs: what an adapter of that name adds to."""
        start = 0
        for part in self.parts:
            if part.name == name:
                return slice(start, start + part.num_rows)
            start += part.num_rows
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Shards:
    """One matrix, in parts, from top to bottom: floats, or what a file has instead. dtype: the model's, to which what
    becomes floats is rounded first"""

    spec: LinearSpec
    dtype: torch.dtype
    tensors: list[Tensor | StoredLevels]

    @classmethod
    def of(cls, weight: Tensor, *, is_output: bool = False) -> Shards:
        return cls(LinearSpec.of(weight, is_output=is_output), weight.dtype, [weight])

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows in the model's dtype; a view where they are kept so."""
        found, first = [], 0
        for tensor in self.tensors:
            low, high = max(start - first, 0), min(stop - first, len(tensor))
            if low < high:
                found.append(floats_of(tensor, low, high, self.dtype))
            first += len(tensor)
        return found[0] if len(found) == 1 else torch.cat(found)

    def take_whole(self) -> Tensor:
        """The matrix on the default device, and the parts are let go: each when it was copied, if there are several."""
        device = torch.get_default_device()
        if len(self.tensors) == 1:
            return as_floats(self.tensors.pop()).to(device, self.dtype)
        whole = torch.empty(self.spec.shape, dtype=self.dtype, device=device)
        start = 0
        while self.tensors:
            tensor = self.tensors.pop(0)
            whole[start : start + len(tensor)].copy_(as_floats(tensor))
            start += len(tensor)
        return whole


class Table(ABC):
    """The rows of an embedding, kept in what a file has them in."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, [n, hidden_size] float32."""

    @abstractmethod
    def describe(self) -> str:
        """What it is kept in, for people."""


class LinearMethod(ABC, Generic[W]):
    """A way to keep matrices, and the products with them. One object serves the layers of one model.

    W: what it keeps of a matrix. Until a layer has that, its weight is what `create` made.
    """

    packs_with_one_thread: ClassVar[bool] = False  # `pack` is not parallel in itself
    has_experts: ClassVar[bool] = False  # `mix_experts` is there

    def __deepcopy__(self, memo: object) -> LinearMethod[W]:
        return self  # layers have it in common, copied ones too

    def accepts(self, spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether such a layer gains by it; else it is kept plainly. ValueError where it cannot run at all."""
        return True

    def create(self, spec: LinearSpec, dtype: torch.dtype) -> nn.Parameter:
        """What stands for the matrix while it is not loaded: its shape, without memory."""
        return nn.Parameter(torch.empty(spec.shape, dtype=dtype, device="meta"), requires_grad=False)

    def stored(self, spec: LinearSpec, part: Part) -> Mapping[str, tuple[int, ...]]:
        """The tensors that a checkpoint has for a part, by the last word of their names, and their shapes."""
        return {"weight": (part.num_rows, spec.num_inputs)}

    def load(self, layer: KeptMatrix, part: str, name: str, tensor: Tensor | StoredLevels) -> None:
        """Takes one of the `stored` tensors; with the last of them, the layer's weight is there."""
        layer.waiting[part, name] = tensor
        wanted = [(part.name, name) for part in layer.spec.parts for name in self.stored(layer.spec, part)]
        if len(layer.waiting) < len(wanted):
            return
        parts = [layer.waiting[key] for key in wanted]
        layer.waiting.clear()
        self._finish(layer, parts)

    def load_whole(self, layer: KeptMatrix, weight: Tensor | StoredLevels) -> None:
        """Takes all parts at once, [num_outputs, num_inputs]."""
        self._finish(layer, [weight])

    def _finish(self, layer: KeptMatrix, parts: list[Tensor | StoredLevels]) -> None:
        layer.note_stored(parts)
        shards = Shards(layer.spec, layer.dtype, parts)
        kept = self.pack(shards)
        if kept is None:
            layer.keep_plainly(shards)
        else:
            layer.keep(kept)

    def keep_table(self, table: StoredLevels, output: object) -> Table | None:
        """An embedding as it is; None where it has to be floats. output: what is kept of the layer that shares it"""
        return None

    def shared_table(self, table: Tensor, output: object) -> Table | None:
        """An embedding of floats in what is kept of the output layer that shares it, where that has every element."""
        return None

    def finish(self) -> None:
        """Frees what only loading needed, when a model is loaded or was given up; another one may follow."""

    @abstractmethod
    def pack(self, shards: Shards) -> W | None:
        """The matrix as it is kept; None where it holds elements that this method cannot. It may take the shards."""

    @abstractmethod
    def apply(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """x @ dense(weight).T + bias. x: [num_rows, num_inputs]. Returns x's dtype, in new memory."""

    def mix_experts(self, x: Tensor, gate_up: W, down: W, weights: Tensor, experts: Tensor) -> Tensor:
        """As `kernels.reference.moe.mix_experts`; of each matrix, experts lie one on top of the other."""
        raise NotImplementedError

    def with_independent_rows(self) -> LinearMethod[W] | None:
        """One for the same weights, whose results for a row depend on the row alone; None where there is none."""
        return None

    @abstractmethod
    def dense(self, weight: W, rows: slice = ALL_ROWS) -> Tensor:
        """Those rows of the matrix that `apply` multiplies by: the definition, with which tests compare."""

    @abstractmethod
    def describe(self, weight: W) -> str:
        """What it is kept in, for people: float16, int8."""


class PlainMethod(LinearMethod[nn.Parameter]):
    """Floats in the model's dtype, [num_outputs, num_inputs], multiplied by torch's own product."""

    def create(self, spec: LinearSpec, dtype: torch.dtype) -> nn.Parameter:
        """Memory, not initialised: random numbers that the checkpoint overwrites take longer than the checkpoint."""
        return nn.Parameter(torch.empty(spec.shape, dtype=dtype), requires_grad=False)

    def load(self, layer: KeptMatrix, part: str, name: str, tensor: Tensor | StoredLevels) -> None:
        """Parts are copied to their rows as they come, in any order, and any number of times."""
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        layer.note_stored([tensor])
        weight.data[layer.spec.rows(part)].copy_(as_floats(tensor))

    def load_whole(self, layer: KeptMatrix, weight: Tensor | StoredLevels) -> None:
        layer.dense().copy_(as_floats(weight))

    def pack(self, shards: Shards) -> nn.Parameter:
        whole = shards.take_whole()
        return nn.Parameter(whole.clone(), requires_grad=False)  # what it was made of may be pages of a file

    def apply(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def dense(self, weight: nn.Parameter, rows: slice = ALL_ROWS) -> Tensor:
        return weight.data[rows]

    def describe(self, weight: nn.Parameter) -> str:
        return str(weight.dtype).removeprefix("torch.")


PLAIN = cast(LinearMethod[object], PlainMethod())


@dataclass(frozen=True, slots=True)
class LinearMethods:
    """Which method keeps each matrix of a model, chosen before anything is loaded: one, or plainly where it gains none.

    keeps_tables: embeddings stay as a file has them, in 16 bits or as integers, since who runs the model reads those
    too; and of all matrices the file's integers are asked for, not what they stand for
    """

    method: LinearMethod[object] = PLAIN
    keeps_tables: bool = False

    def of_experts(self, spec: LinearSpec, dtype: torch.dtype) -> LinearMethod[object]:
        """That of a matrix of experts, whose products choose among its rows."""
        return self.of(spec, dtype) if self.method.has_experts else PLAIN

    def of(self, spec: LinearSpec, dtype: torch.dtype) -> LinearMethod[object]:
        has_elements = 0 not in spec.shape  # without them there is nothing to gain, and kernels refuse
        return self.method if has_elements and self.method.accepts(spec, dtype, torch.get_default_device()) else PLAIN


class KeptMatrix(nn.Module):
    """A layer's matrix. `weight` is what its method keeps of it; it is a parameter until then, and for plain floats.

    dtype: the model's, in which the matrix is multiplied or from which it is packed
    """

    weight: object

    def __init__(self, spec: LinearSpec, method: LinearMethod[object], *, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.method, self.dtype = spec, method, dtype
        self.waiting: dict[tuple[str, str], Tensor | StoredLevels] = {}  # parts that came, until all are there
        self.stored_as: tuple[str, ...] = ()  # how a checkpoint has its parts, in its own words
        self.weight = method.create(spec, dtype)

    @property
    def in_features(self) -> int:
        return self.spec.num_inputs

    @property
    def out_features(self) -> int:
        return self.spec.num_outputs

    @property
    def is_plain(self) -> bool:
        return isinstance(self.weight, nn.Parameter)

    def load(self, part: str, tensor: Tensor | StoredLevels, name: str = "weight") -> None:
        """One tensor of a checkpoint; with the last one, the matrix is brought into its final layout."""
        self.method.load(self, part, name, tensor)

    def load_whole(self, weight: Tensor | StoredLevels) -> None:
        """All parts at once, [num_outputs, num_inputs]."""
        self.method.load_whole(self, weight)

    def note_stored(self, parts: Iterable[Tensor | StoredLevels]) -> None:
        labels = [part.label for part in parts if isinstance(part, StoredLevels) and part.label]
        self.stored_as = tuple(dict.fromkeys((*self.stored_as, *labels)))

    def keep(self, weight: object) -> None:
        del self.weight  # a parameter, in whose place torch takes nothing else
        self.weight = weight

    def keep_plainly(self, shards: Shards) -> None:
        """Floats that no format holds. They stay where they are if the layer has them: in an embedding, that is."""
        self.method = PLAIN
        if isinstance(self.weight, nn.Parameter) and self.weight.is_meta:
            self.keep(PLAIN.pack(shards))

    def dense(self, rows: slice = ALL_ROWS) -> Tensor:
        return self.method.dense(self.weight, rows)

    def describe(self) -> str:
        kept = self.method.describe(self.weight)
        return f"{kept}, stored as {' and '.join(self.stored_as)}" if self.stored_as else kept


class Linear(KeptMatrix):
    """A linear layer: x @ weight.T + bias."""

    def __init__(self, spec: LinearSpec, method: LinearMethod[object], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(spec, method, dtype=dtype)
        values = torch.empty(spec.num_outputs, dtype=dtype) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    @classmethod
    def holding(cls, weight: W, spec: LinearSpec, method: LinearMethod[W], bias: nn.Parameter | None) -> Linear:
        """A layer whose matrix was packed elsewhere."""
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        with torch.device("meta"):
            layer = cls(spec, cast(LinearMethod[object], method), bias=False, dtype=dtype)
        layer.bias = bias
        layer.keep(weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., num_inputs] -> [..., num_outputs]"""
        if x.dim() == 2:
            return self.method.apply(x, self.weight, self.bias)
        out = self.method.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])


def exchange_linears(model: nn.Module, methods: LinearMethods, *, num_threads: int = 1) -> list[Linear]:
    """Exchanges the linear layers of `model` that are plain floats, nn.Linear among them, for packed ones, in place;
    and packs the matrices of experts, where the method multiplies with those.

    For models that others build and fill. Each frees its float matrix, so that memory peaks at a few matrices more than
    before; an embedding that shares its matrix with the output layer keeps it. num_threads: what packing may take
    """
    places = [(parent, name) for parent, name, _ in plain_linears(model)]
    num_at_once = num_threads if methods.method.packs_with_one_thread else 1
    num_before = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // num_at_once))
    try:
        with ThreadPoolExecutor(num_at_once) as pool:  # packing holds no interpreter lock
            packed = list(pool.map(lambda place: exchange_linear(place[0], place[1], methods), places))
        for module in model.modules():
            if type(module) is KeptMatrix and module.is_plain:
                _pack_in_place(module, methods)
    finally:
        methods.method.finish()
        torch.set_num_threads(num_before)
    return [layer for layer in packed if layer is not None]


@torch.no_grad()
def _pack_in_place(matrix: KeptMatrix, methods: LinearMethods) -> None:
    weight = matrix.dense()
    with weight.device:
        method = methods.of_experts(matrix.spec, weight.dtype)
        kept = None if method is PLAIN else method.pack(Shards(matrix.spec, weight.dtype, [weight]))
    if kept is not None:
        matrix.method = method
        matrix.keep(kept)


def plain_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear | Linear]]:
    """(parent, name, layer) of those that `exchange_linears` would exchange."""
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    return [place for place in children if _is_plain(place[2])]  # type: ignore[misc]


def _is_plain(module: nn.Module) -> bool:
    """A subclass may compute something else."""
    return type(module) is nn.Linear or (type(module) is Linear and module.is_plain)


@torch.no_grad()
def exchange_linear(parent: nn.Module, name: str, methods: LinearMethods) -> Linear | None:
    """Exchanges a child of `parent` for a packed one; None where it gains nothing, or holds what no format does."""
    child = getattr(parent, name)
    weight: Tensor = child.weight.detach()
    spec = child.spec if isinstance(child, Linear) else LinearSpec.of(weight, is_output=name == "lm_head")
    with weight.device:
        method = methods.of(spec, weight.dtype)
        kept = None if method is PLAIN else method.pack(Shards(spec, weight.dtype, [weight]))
    if kept is None:
        return None
    layer = Linear.holding(kept, spec, method, child.bias)
    setattr(parent, name, layer)
    return layer
