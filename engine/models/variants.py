"""Members of the Llama family that differ by more than their config says."""

from __future__ import annotations

from dataclasses import replace

from engine.models.architecture import Architecture
from engine.models.llama import Llama


class Qwen2(Llama):
    """Llama with biases on queries, keys and values (Qwen2 technical report, section 2.2.1)."""

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        return replace(architecture, qkv_bias=True)


class Qwen3(Llama):
    """Llama that normalises each head's query and key (Qwen3 technical report, section 2)."""

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        return replace(architecture, qk_norm="head")


class Phi3(Llama):
    """Llama whose checkpoints hold the merged matrices that the others get when they are loaded."""

    @staticmethod
    def adapt(architecture: Architecture) -> Architecture:
        return replace(architecture, has_merged_weights=True)
