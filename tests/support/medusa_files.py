"""Small Medusa checkpoints of random weights, in every layout, and the definition of what they compute, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, VOCAB, NUM_HEADS = 32, 30, 3  # as wide as compiled products need


@dataclass(frozen=True)
class TinyHeads:
    """target: [VOCAB, HIDDEN] the model's output matrix. outputs: of each head; empty: the target's"""

    weights: list[list[Tensor]]  # [head][layer]
    biases: list[list[Tensor]]
    target: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    token_map: Tensor | None = None
    markov: tuple[Tensor, Tensor] | None = None
    newest: list[Tensor] = field(default_factory=list)

    @classmethod
    def random(cls, *, num_layers: int = 1, seed: int = 0) -> TinyHeads:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return cls(
            [[0.3 * draw(HIDDEN, HIDDEN) for _ in range(num_layers)] for _ in range(NUM_HEADS)],
            [[0.5 * draw(HIDDEN) for _ in range(num_layers)] for _ in range(NUM_HEADS)],
            draw(VOCAB, HIDDEN),
            [draw(VOCAB, HIDDEN) for _ in range(NUM_HEADS)],
        )

    def on_target_output(self) -> TinyHeads:
        return replace(self, outputs=[])

    def without_biases(self) -> TinyHeads:
        return replace(self, biases=[[torch.zeros(HIDDEN) for _ in head] for head in self.biases])

    def tied(self) -> TinyHeads:
        """All layers of a head are its first, as FasterDecoding makes them."""
        return replace(
            self,
            weights=[[head[0]] * len(head) for head in self.weights],
            biases=[[head[0]] * len(head) for head in self.biases],
        )

    def with_token_map(self, tokens: list[int]) -> TinyHeads:
        return replace(self, token_map=torch.tensor(tokens), outputs=[output[tokens] for output in self.outputs])

    def with_corrections(self, rank: int = 4, *, rows: int | None = None) -> TinyHeads:
        num_known = VOCAB if self.token_map is None else len(self.token_map)
        generator = torch.Generator().manual_seed(9)
        first = torch.randn(rows or num_known, rank, generator=generator)
        second = torch.randn(num_known, rank, generator=generator)
        newest = [0.3 * torch.randn(HIDDEN, rank, generator=generator) for _ in self.weights]
        return replace(self, markov=(first, second), newest=newest)

    def output_rows(self, token_ids: Tensor | None) -> Tensor:
        return self.target if token_ids is None else self.target[token_ids]

    def known_tokens(self) -> list[int]:
        return list(range(VOCAB)) if self.token_map is None else self.token_map.tolist()

    def features(self, token: int) -> Tensor | None:
        """The token's row of the Markov term's first matrix, zero for tokens that the heads do not know."""
        if self.markov is None:
            return None
        first = self.markov[0].double()
        if len(first) == VOCAB:
            return first[token]
        known = self.known_tokens()
        return first[known.index(token)] if token in known else torch.zeros(first.shape[1], dtype=torch.float64)

    def logits(self, head: int, state: Tensor, newest: int) -> Tensor:
        """One head's logits from one state, as the paper and the papers of the corrections define them."""
        x = state.double()
        feature = self.features(newest)
        for layer, (weight, bias) in enumerate(zip(self.weights[head], self.biases[head], strict=True)):
            inner = weight.double() @ x + bias.double()
            if layer == 0 and self.newest and feature is not None:
                inner = inner + self.newest[head].double() @ feature
            x = x + inner * torch.sigmoid(inner)
        output = self.outputs[head] if self.outputs else self.target[self.known_tokens()]
        return output.double() @ x

    def bias(self, previous: int) -> Tensor:
        feature = self.features(previous)
        if self.markov is None or feature is None:
            return torch.zeros(len(self.known_tokens()), dtype=torch.float64)
        return self.markov[1].double() @ feature


def reference_tensors(heads: TinyHeads, prefix: str = "") -> dict[str, Tensor]:
    """FasterDecoding's state dict."""
    tensors = {}
    for head, layers in enumerate(heads.weights):
        for layer, weight in enumerate(layers):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = weight.clone()
            tensors[f"{prefix}{head}.{layer}.linear.bias"] = heads.biases[head][layer].clone()
        tensors[f"{prefix}{head}.{len(layers)}.weight"] = heads.outputs[head].clone()
    return tensors


def vllm_tensors(heads: TinyHeads, prefix: str = "", *, biases: bool = True) -> dict[str, Tensor]:
    tensors = {}
    for head, layers in enumerate(heads.weights):
        for layer, weight in enumerate(layers):
            tensors[f"{prefix}blocks.{head}.layers.{layer}.weight"] = weight.clone()
            if biases:
                tensors[f"{prefix}blocks.{head}.layers.{layer}.bias"] = heads.biases[head][layer].clone()
        if heads.outputs:
            tensors[f"{prefix}lm_heads.{head}.weight"] = heads.outputs[head].clone()
        if heads.newest:
            tensors[f"{prefix}blocks.{head}.newest.weight"] = heads.newest[head].clone()
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map.clone()
    if heads.markov is not None:
        tensors["markov_w1.weight"], tensors["markov_w2.weight"] = (matrix.clone() for matrix in heads.markov)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], *, name: str = "model.safetensors", **config: object) -> Path:
    """A directory with these tensors, and a config.json of these fields where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    save: Callable[[dict[str, Tensor], Path], object] = torch.save if name.endswith(".pt") else save_file
    save(tensors, folder / name)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
