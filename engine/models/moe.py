"""The Llama family with experts (Shazeer et al., 2017): layers that send each token through a few of many MLPs.

Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE differ in facts (`Architecture`, `Mixture`), not in code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.architecture import Architecture, Mixture
from engine.models.llama import MLP, Llama
from engine.models.model import ExpertFacts
from engine.models.operations import Operations
from engine.quantization.linear import KeptMatrix, LinearMethods, LinearSpec, Part
from engine.quantization.stored_levels import StoredLevels

_OF_EXPERT = re.compile(r"(\.experts)\.\d+\.(?:(down_proj)|(?:gate|up)_proj)\.weight$")
_NAMES_OF_MIXTRAL = {  # in its first checkpoints
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}


class Gate(nn.Module):
    """Scores that decide what a token goes through. No `Linear`, as those may be quantised."""

    def __init__(self, num_inputs: int, num_outputs: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Experts(nn.Module):
    """The matrices of a layer's experts, one on top of the other. Their products choose among rows, so that they are
    kept plainly, but by a method that can choose."""

    def __init__(self, mixture: Mixture, methods: LinearMethods, *, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, size = mixture.num_experts, mixture.intermediate_size
        names = ("gate_proj", "up_proj")  # as a checkpoint names each expert's: gate first
        gate_up = tuple(Part(f"{i}.{name}", size) for i in range(self.num_experts) for name in names)
        down = tuple(Part(f"{i}.down_proj", hidden_size) for i in range(self.num_experts))
        specs = LinearSpec(hidden_size, gate_up, axis="outputs"), LinearSpec(size, down, axis="inputs")
        kept = [KeptMatrix(spec, methods.of_experts(spec, dtype), dtype=dtype) for spec in specs]
        self.gate_up_proj, self.down_proj = kept

    @property
    def stacks(self) -> tuple[Tensor, Tensor]:
        """[num_experts, 2 * intermediate_size, hidden_size], and [num_experts, hidden_size, intermediate_size]"""
        gate_up, down = (matrix.dense().to(matrix.dtype) for matrix in (self.gate_up_proj, self.down_proj))
        return gate_up.view(self.num_experts, -1, gate_up.shape[1]), down.view(self.num_experts, -1, down.shape[1])

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor, operations: Operations) -> Tensor:
        """As `kernels.reference.moe.mix_experts`."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if gate_up.is_plain or down.is_plain:
            return operations.mix_experts(x, *self.stacks, weights, experts)
        return gate_up.method.mix_experts(x, gate_up.weight, down.weight, weights, experts)


class SparseMLP(nn.Module):
    """Experts, the router that chooses among them, and the expert that every token goes through, where there is one."""

    def __init__(self, architecture: Architecture, mixture: Mixture, methods: LinearMethods) -> None:
        super().__init__()
        a, size = architecture, architecture.hidden_size
        self.mixture = mixture
        self.gate = Gate(size, mixture.num_experts, dtype=a.dtype)
        self.experts = Experts(mixture, methods, hidden_size=size, dtype=a.dtype)
        has_shared = mixture.shared_size > 0
        self.shared_expert = MLP(a, methods, intermediate_size=mixture.shared_size) if has_shared else None
        self.shared_expert_gate = Gate(size, 1, dtype=a.dtype) if has_shared else None

    def forward(self, x: Tensor, operations: Operations) -> Tensor:
        """x: [num_tokens, hidden_size]"""
        mixture = self.mixture
        weights, experts = operations.route(self.gate(x), mixture.top_k, normalise=mixture.normalises)
        mixed = self.experts.mix(x, weights, experts, operations)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return mixed
        return mixed.addcmul_(self.shared_expert_gate(x).sigmoid(), self.shared_expert(x, operations))


class SparseLlama(Llama):
    """A Llama with experts in all layers or in some."""

    @property
    def experts(self) -> ExpertFacts:
        a = self.architecture
        mixtures = [mixture for mixture in a.mixtures if mixture is not None]
        if not mixtures:
            return ExpertFacts()
        mixture = mixtures[0]  # they are alike
        return ExpertFacts(
            num_parameters=len(mixtures) * mixture.num_experts * 3 * a.hidden_size * mixture.intermediate_size,
            share=mixture.top_k / mixture.num_experts,
            widest=mixture.top_k * (a.hidden_size + 2 * mixture.intermediate_size),
        )

    @property
    def widths(self) -> dict[str, int]:
        a = self.architecture
        mixtures = [mixture for mixture in a.mixtures if mixture is not None]
        if not mixtures:
            return super().widths
        found = {"expert": mixtures[0].intermediate_size, "shared expert": mixtures[0].shared_size}
        return found | ({"intermediate": a.intermediate_size} if None in a.mixtures else {})

    @staticmethod
    def make_mlp(architecture: Architecture, index: int, methods: LinearMethods) -> nn.Module:
        mixture = architecture.mixtures[index]
        if mixture is None:
            return Llama.make_mlp(architecture, index, methods)
        return SparseMLP(architecture, mixture, methods)

    def own_name(self, name: str) -> str:
        for old, new in _NAMES_OF_MIXTRAL.items():
            name = name.replace(old, new)
        return name

    def _one_by_one(
        self, weights: Iterable[tuple[str, Tensor | StoredLevels]]
    ) -> Iterator[tuple[str, Tensor | StoredLevels]]:
        """Every expert's matrices under their own names, whether the checkpoint keeps them apart or stacked."""
        for stored_name, weight in weights:
            name = self.own_name(stored_name)
            is_stack = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
            if is_stack and isinstance(weight, Tensor) and weight.dim() == 3:
                yield from _matrices(name, weight)
            else:
                yield name, weight


class Qwen3Moe(SparseLlama):
    """SparseLlama that normalises each head's query and key (Qwen3 technical report, section 2)."""

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        return replace(architecture, qk_norm="head")


class Olmoe(SparseLlama):
    """SparseLlama that normalises all queries of a token as one vector, and its keys (Muennighoff et al., 2024)."""

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        return replace(architecture, qk_norm="projection")


def name_of_stack(name: str) -> str:
    """What a checkpoint that stacks experts calls the stack that has this matrix of one."""
    return _OF_EXPERT.sub(lambda match: f"{match[1]}.{match[2] or 'gate_up_proj'}", name)


def _matrices(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views of the matrices in ".experts.gate_up_proj" or ".experts.down_proj", named as a checkpoint names each."""
    parent, _, kind = name.rpartition(".")
    for number, matrix in enumerate(stacked):
        if kind == "down_proj":
            yield f"{parent}.{number}.down_proj.weight", matrix
        else:
            gate, up = matrix.tensor_split(2)
            yield f"{parent}.{number}.gate_proj.weight", gate
            yield f"{parent}.{number}.up_proj.weight", up
