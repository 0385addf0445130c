"""Other implementations of a product with 4-bit weights in groups of 128: their speed, with weights drawn at random."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]  # [num_rows, num_inputs] bfloat16 -> [num_rows, num_outputs]
GROUP = 128


def tinygemm(num_outputs: int, num_inputs: int) -> Multiply:
    """torch's own, whose matrix is laid out by torch."""
    packed = torch.randint(256, (num_outputs, num_inputs // 2), dtype=torch.uint8, device="cuda")
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales = torch.rand(num_inputs // GROUP, num_outputs, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales)


def gemlite(num_outputs: int, num_inputs: int) -> Multiply:
    """GemLite, which chooses among its Triton kernels by the number of rows, and tunes them on their first call."""
    core = importlib.import_module("gemlite.core")
    layer = core.GemLiteLinearTriton(
        4, GROUP, num_inputs, num_outputs, input_dtype=core.DType.BF16, output_dtype=core.DType.BF16
    )
    codes = torch.randint(16, (num_outputs, num_inputs), dtype=torch.uint8, device="cuda")
    scales = torch.rand(num_outputs, num_inputs // GROUP, dtype=torch.bfloat16, device="cuda")
    layer.pack(codes, scales, torch.full_like(scales, 8), bias=None)
    multiply: Multiply = layer
    return multiply


def humming(num_outputs: int, num_inputs: int) -> Multiply:
    """Humming, which compiles a kernel for the shape: it needs nvcc."""
    module = importlib.import_module("humming.layer")
    layer = module.HummingLayer(
        shape_n=num_outputs,
        shape_k=num_inputs,
        weight_config={"dtype": "uint4", "group_size": GROUP, "scale_dtype": "bfloat16", "has_zero_point": False},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16, device="cuda"))
    layer.transform()
    getattr(layer, "prepare_default_kernel_configs", lambda: None)()  # releases differ
    multiply: Multiply = layer
    return multiply


def marlin(num_outputs: int, num_inputs: int) -> Multiply:
    """Marlin as vLLM has it."""
    operations = importlib.import_module("vllm._custom_ops")
    kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
    weight = torch.randint(2**31 - 1, (num_inputs // 16, num_outputs * 2), dtype=torch.int32, device="cuda")
    scales = torch.rand(num_inputs // GROUP, num_outputs, dtype=torch.bfloat16, device="cuda")
    num_locks = 4 * torch.cuda.get_device_properties().multi_processor_count
    workspace = torch.zeros(num_locks, dtype=torch.int, device="cuda")

    def multiply(x: Tensor) -> Tensor:
        out: Tensor = operations.marlin_gemm(
            a=x, c=None, b_q_weight=weight, b_bias=None, b_scales=scales, a_scales=None, global_scale=None,
            b_zeros=None, g_idx=None, perm=None, workspace=workspace, b_q_type=kind, size_m=len(x), size_n=num_outputs,
            size_k=num_inputs, use_atomic_add=False,
        )  # fmt: skip
        return out

    return multiply


PEERS = {"tinygemm": tinygemm, "GemLite": gemlite, "Humming": humming, "Marlin": marlin}
