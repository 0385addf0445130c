"""Which matrices of a checkpoint are quantised, and its weights with those put together again."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from engine.loading.quantized.awq import awq_matrix
from engine.loading.quantized.bitsandbytes import bitsandbytes_matrix
from engine.loading.quantized.compressed_tensors import compressed_matrix
from engine.loading.quantized.fp8 import fp8_matrix, modelopt_matrix
from engine.loading.quantized.gptq import gptq_matrix
from engine.loading.quantized.matrix_header import Headers, MatrixHeader
from engine.loading.quantized.scheme import Scheme
from engine.loading.stored_weights import StoredTensor, is_output
from engine.quantization.stored_levels import StoredLevels

ReadHeader = Callable[[Headers, Scheme], MatrixHeader | None]

METHODS: dict[str, ReadHeader] = {  # by quant_method
    "gptq": gptq_matrix,
    "awq": awq_matrix,
    "compressed-tensors": compressed_matrix,
    "fp8": fp8_matrix,
    "fbgemm_fp8": fp8_matrix,
    "modelopt": modelopt_matrix,
    "modelopt_fp4": modelopt_matrix,
    "bitsandbytes": bitsandbytes_matrix,
}
_SIDE_TENSORS = re.compile(  # of activations and of the KV cache, which are not rounded as those say
    r"\.((input|output)_(scale|zero_point|global_scale|scale_ub)|[kqv]_scale|[kv]_zero_point|kv_cache_scaling_factor"
    r"|activation_scale)$"
)
_KEY = re.compile(r"(.*?)\.(weight\.[\w.]+|[^.]+)", re.DOTALL)  # layer, and the last words


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """matrices: by the name that a weight of floats would have. side: names of tensors that nobody reads

    rounds_activations: whether the checkpoint was made for activations of 8 bits or fewer
    """

    matrices: Mapping[str, MatrixHeader] = field(default_factory=dict)
    side: frozenset[str] = frozenset()
    rounds_activations: bool = False

    def __bool__(self) -> bool:
        return bool(self.matrices)

    @property
    def has_output(self) -> bool:
        """Whether the output layer is one of them; an embedding never is."""
        return any(is_output(name) for name in self.matrices)

    def rest(self, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors that are neither part of a matrix nor on its side."""
        taken = {tensor.name for header in self.matrices.values() for tensor in header.tensors.values()} | self.side
        return {name: tensor for name, tensor in stored.items() if name not in taken}

    def restore(
        self, weights: Iterable[tuple[str, Tensor]], *, known: Container[str] | None = None
    ) -> Iterator[tuple[str, Tensor | StoredLevels]]:
        """The weights with each matrix whole, as soon as its last tensor comes.

        known: the names of a model, if it has a list: biases of zeros that it does not know are left out, which
        quantisers of old wrote beside every matrix. ValueError names a matrix that is damaged.
        """
        owner = {t.name: (name, key) for name, header in self.matrices.items() for key, t in header.tensors.items()}
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            if name in self.side or (known is not None and self._is_needless_bias(name, tensor, known)):
                continue
            if name not in owner:
                yield name, tensor
                continue
            matrix, key = owner[name]
            found = waiting.setdefault(matrix, {})
            found[key] = tensor
            if len(found) == len(self.matrices[matrix].tensors):
                del tensor, waiting[matrix]
                yield matrix, self._read(matrix, found)
                del found

    def _read(self, name: str, tensors: Mapping[str, Tensor]) -> StoredLevels:
        try:
            return self.matrices[name].read(tensors)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.weight')}: {error}") from error

    def _is_needless_bias(self, name: str, tensor: Tensor, known: Container[str]) -> bool:
        layer, _, kind = name.rpartition(".")
        return kind == "bias" and f"{layer}.weight" in self.matrices and name not in known and not bool(tensor.any())


def read_quantized(stored: Mapping[str, StoredTensor], scheme: Scheme) -> QuantizedWeights:
    """From headers alone. ValueError for a method that is not known, and for tensors that do not go together."""
    read = METHODS.get(scheme.method)
    if read is None:
        raise ValueError(
            f"the checkpoint's weights are quantised ({scheme.method}), and of quantisers {', '.join(METHODS)} are "
            "supported; use the original checkpoint, with model.quantization if its weights are to be small"
        )
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        if match := _KEY.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
    matrices = {}
    for layer, tensors in layers.items():
        try:
            header = read(tensors, scheme)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        if header is not None:
            matrices[f"{layer}.weight"] = header
    if not matrices:
        return QuantizedWeights()
    side = frozenset(name for name in stored if _SIDE_TENSORS.search(name))
    return QuantizedWeights(matrices, side, bool(side) or scheme.rounds_activations)
