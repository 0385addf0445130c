"""Writes what `test_quantization_config.py` compares with: configs as compressed-tensors 0.20.0 makes them of a model.

Run it in an environment that has that: python tests/engine/compression/oracles/make_config.py > configs.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHTS = {
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "observer": "mse"},
    "int8 zero points": {
        "num_bits": 8, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False, "observer": "minmax",
    },
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "observer": "minmax"},
}  # fmt: skip
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def config_of(name: str) -> dict[str, object]:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).to(torch.bfloat16)  # fmt: skip
    group: dict[str, object] = {"targets": ["Linear"], "weights": WEIGHTS[name]}
    if name == "fp8":
        group["input_activations"] = ACTIVATIONS
    asked = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, asked)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        compressor.update_config(folder)
        found: dict[str, object] = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    return found


if __name__ == "__main__":
    json.dump({name: config_of(name) for name in WEIGHTS}, sys.stdout, indent=1, sort_keys=True)
    print()
