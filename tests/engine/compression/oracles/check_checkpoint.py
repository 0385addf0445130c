"""Compares a checkpoint as compressed-tensors decompresses it with what `python -m ... dump` of ours wrote: see below.

    .venv/bin/python tests/engine/compression/oracles/check_checkpoint.py dump CHECKPOINT WEIGHTS.safetensors
    OTHER/bin/python tests/engine/compression/oracles/check_checkpoint.py compare CHECKPOINT WEIGHTS.safetensors

The first in this project's environment: weights as our loader has them. The second in one with compressed-tensors and
transformers: every weight must be the same, in the model's dtype.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dump(checkpoint: str, output: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[4]))
    from tests.support.loaded_models import load_plain, weights_of

    found = {name: tensor.float() for name, tensor in weights_of(load_plain(Path(checkpoint))).items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, output)


def compare(checkpoint: str, output: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    asked = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=asked, dtype="auto")
    theirs, ours = dict(model.named_parameters()), load_file(output)
    num_same = 0
    for name, weight in ours.items():
        if name == "lm_head.weight" and name not in theirs:
            continue
        other = theirs[name].detach()
        if not torch.equal(weight.to(other.dtype), other):
            distance = (weight - other.float()).abs().max()
            raise SystemExit(f"{name} differs by up to {distance}, of {weight.abs().max()}")
        num_same += 1
    print(f"{num_same} weights are the same")


if __name__ == "__main__":
    {"dump": dump, "compare": compare}[sys.argv[1]](*sys.argv[2:])
