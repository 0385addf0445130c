"""The interface of attention back ends, which read and write the paged KV cache of a model, and their registry."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from kernels.reference.qkv import normalise_and_rotate

ATTENTION_BACKENDS = {
    "torch": "engine.attention.torch_backend:TorchAttention",
    "triton": "engine.attention.triton_backend:TritonAttention",
}

Rotation = tuple[Tensor, Tensor]  # cos and sin of every row, as `kernels.reference.rope.rope_factors` makes them


class HeadNorms(NamedTuple):
    """RMSNorm of queries and keys: of each head, or of all heads together, as the sizes of the weights say."""

    q_weight: Tensor | None  # [head_dim] or [num_heads * head_dim]; None, as is k_weight: there is no norm
    k_weight: Tensor | None  # [head_dim] or [num_kv_heads * head_dim]
    eps: float


class AttentionBackend(Protocol):
    """Reads and writes one KV cache. One call covers prompt chunks, decoding and (tree) verification."""

    def plan(self, batch: ForwardBatch) -> None:
        """Makes what the layers of a step share, such as indices and addresses. Called once, before they run."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """Stores k and v into their slots and attends.

        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]. Returns q's shape.
        """
        ...

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        """The same, from what the merged projection gives: normalises queries and keys first, and rotates them.

        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first
        """
        ...


def normalise_rotate_and_attend(
    attention: AttentionBackend,
    qkv: Tensor,
    rotation: Rotation | None,
    norms: HeadNorms,
    layer: AttentionLayer,
    batch: ForwardBatch,
) -> Tensor:
    """`attend_projection` as separate operations, for back ends without a fused one."""
    q, k, v = torch.split(qkv, [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    cos, sin = rotation or (None, None)
    q, k = normalise_and_rotate(q, k, cos, sin, q_weight=norms.q_weight, k_weight=norms.k_weight, eps=norms.eps)
    return attention(q, k, v, layer, batch)
