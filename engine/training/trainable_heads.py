"""Medusa heads as parameters: what `engine.speculation.medusa_heads` computes, with gradients, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

_SPREAD = 0.1  # of random beginnings


class TrainableHeads(nn.Module):
    """num_heads blocks of one layer on a frozen output matrix, a Markov term, and the newest token in each block.

    Blocks and corrections begin as zero, so that each head begins as the target's own guess of the next token.
    """

    def __init__(self, output: Tensor, *, num_heads: int, markov_rank: int) -> None:
        """output: [num_known, hidden_size]"""
        super().__init__()
        num_known, size = output.shape
        self.num_heads, self.markov_rank = num_heads, markov_rank
        self._output = output
        self.weight = nn.Parameter(torch.zeros(num_heads, size, size))
        self.bias = nn.Parameter(torch.zeros(num_heads, size))
        self.newest = nn.Parameter(torch.zeros(num_heads, size, markov_rank))
        self.markov_w1 = nn.Parameter(torch.randn(num_known, markov_rank) * _SPREAD)
        self.markov_w2 = nn.Parameter(torch.zeros(num_known, markov_rank))

    def forward(self, states: Tensor, previous: Tensor, rows: Tensor) -> list[Tensor]:
        """The logits of each head for some rows, [B, len(rows)].

        previous: [B, num_heads] rows of the tokens before those that are guessed; the first is the newest token
        """
        features = F.embedding(previous, torch.cat((self.markov_w1, torch.zeros_like(self.markov_w1[:1]))))
        matrix = torch.cat((self._output[rows], self.markov_w2[rows]), dim=1)
        logits = []
        for head in range(self.num_heads):
            inner = F.linear(states, self.weight[head], self.bias[head])
            inner = inner + F.linear(features[:, 0], self.newest[head])
            x = states + F.silu(inner)
            logits.append(F.linear(torch.cat((x, features[:, head]), dim=1), matrix))
        return logits

    def save(self, folder: Path, *, known: Tensor, vocab_size: int, fields: dict[str, object]) -> None:
        """Writes config.json and model.safetensors in vLLM's layout, with bfloat16 weights and `fields` in the config.

        known: [num_known] token ids, by row
        """
        tensors: dict[str, Tensor] = {"token_map": known.contiguous()}
        for head in range(self.num_heads):
            tensors[f"blocks.{head}.layers.0.weight"] = self.weight[head]
            tensors[f"blocks.{head}.layers.0.bias"] = self.bias[head]
            if self.markov_rank:
                tensors[f"blocks.{head}.newest.weight"] = self.newest[head]
        if self.markov_rank:
            tensors |= {"markov_w1.weight": self.markov_w1, "markov_w2.weight": self.markov_w2}
        kept = {
            name: tensor.detach().to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.weight.shape[1],
            "num_heads": self.num_heads,
            "num_hidden_layers": 1,
            "vocab_size": vocab_size,
            "truncated_vocab_size": len(known),
            "original_lm_head": True,
            "medusa_fc_bias": True,
            **fields,
        }
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors"
        save_file(kept, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets nobody else read it
        partial.replace(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
