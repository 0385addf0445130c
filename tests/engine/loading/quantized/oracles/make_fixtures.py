"""Writes the matrices that `test_oracles.py` compares with: packed and dequantised by the library that owns a layout.

Run it in an environment that has them, with the library's name; it writes NAME.safetensors beside itself:

    python tests/engine/loading/quantized/oracles/make_fixtures.py compressed-tensors    # 0.20.0
    python tests/engine/loading/quantized/oracles/make_fixtures.py bitsandbytes          # 0.50.2
    python tests/engine/loading/quantized/oracles/make_fixtures.py gptqmodel             # 7.7.0

Keys are "case/tensor", and "case/dense" for what the library makes of it. The metadata have each case's config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, DEPTH = 32, 64
Case = tuple[str, dict[str, object], dict[str, Tensor], Tensor]  # name, quantization config, tensors, dense


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    def case(name: str, format: str, weights: dict[str, object], **state: Tensor) -> Case:
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        compressor = BaseCompressor.get_value_from_registry(format)
        weight = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(1)).bfloat16() / 8
        packed = compressor.compress({"weight": weight, **state}, scheme)
        dense = compressor.decompress({key: value.clone() for key, value in packed.items()}, scheme)["weight"]
        described = {"num_bits": weights["num_bits"], "type": weights["type"]}
        if "block_structure" in weights:
            described["block_structure"] = weights["block_structure"]
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": described}}}
        return name, config, packed, dense

    def scales(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 0.05) -> Tensor:
        return ((torch.rand(*shape, generator=torch.Generator().manual_seed(2)) + 0.5) * size).to(dtype)

    for bits in range(2, 9):
        grouped = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
        step = 0.5 / 2 ** (bits - 1)
        own = scales(ROWS, DEPTH // 32, size=step)
        yield case(f"packed {bits}", "pack-quantized", grouped, weight_scale=own)
        zeros = torch.randint(-1, 2, (ROWS, DEPTH // 32), generator=torch.Generator().manual_seed(3)).to(torch.int8)
        asymmetric = grouped | {"symmetric": False}
        yield case(
            f"packed {bits}, zero points", "pack-quantized", asymmetric, weight_scale=own, weight_zero_point=zeros
        )
    channel = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    yield case("integers", "int-quantized", channel, weight_scale=scales(ROWS, 1, size=0.004))
    tensor = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    yield case("floats", "float-quantized", tensor, weight_scale=scales(1, size=0.002))
    rows = tensor | {"strategy": "channel"}
    yield case("floats of rows", "float-quantized", rows, weight_scale=scales(ROWS, 1, size=0.002))
    block = tensor | {"strategy": "block", "block_structure": [16, 16]}
    yield case("floats of blocks", "float-quantized", block, weight_scale=scales(2, 4, size=0.002))
    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    nv |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    fine = scales(ROWS, DEPTH // 16, size=40).to(torch.float8_e4m3fn).bfloat16()
    yield case("nvfp4", "nvfp4-pack-quantized", nv, weight_scale=fine, weight_global_scale=torch.tensor([512.7]))
    mx = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    mx |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    powers = 2.0 ** torch.randint(-6, -3, (ROWS, DEPTH // 32), generator=torch.Generator().manual_seed(4))
    yield case("mxfp4", "mxfp4-pack-quantized", mx, weight_scale=powers.bfloat16())


def bitsandbytes() -> Iterator[Case]:
    import bitsandbytes.functional as F

    weight = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(1)) / 8
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            octets, state = F.quantize_4bit(weight.half(), blocksize=64, quant_type=kind, compress_statistics=nested)
            tensors = {"weight": octets} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            dense = F.dequantize_4bit(octets, state)
            yield f"{kind}{', nested' if nested else ''}", {"quant_method": "bitsandbytes"}, tensors, dense
    integers, factors, _ = F.int8_vectorwise_quant(weight.half())
    dense = F.int8_vectorwise_dequant(integers, factors)
    tensors = {"weight": integers, "SCB": factors, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "int8", {"quant_method": "bitsandbytes"}, tensors, dense


def gptqmodel() -> Iterator[Case]:
    """GPTQ's second version, as the library packs it, and the first, whose zero points it then subtracts 1 from."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    depth = 128

    def random(*shape: int, low: int, high: int, seed: int) -> Tensor:
        return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))

    for bits in (2, 3, 4, 8):
        for is_ordered in (False, True):
            top, groups = 1 << bits, depth // 32
            zeros = random(ROWS, groups, low=0, high=top, seed=bits)
            scales = (torch.rand(ROWS, groups, generator=torch.Generator().manual_seed(5)) + 0.5) / top
            index = torch.arange(depth) // 32
            if is_ordered:
                index = index[torch.randperm(depth, generator=torch.Generator().manual_seed(6))]
            codes = random(ROWS, depth, low=0, high=top, seed=7)
            linear = torch.nn.Linear(depth, ROWS, bias=False)
            linear.weight.data = (codes - zeros[:, index]) * scales[:, index]
            layer = TorchLinear(
                bits=bits, group_size=32, sym=False, desc_act=is_ordered, in_features=depth, out_features=ROWS
            )
            layer.pack_original(linear, scales, zeros.float(), index.int())
            layer.post_init()
            dense = layer.dequantize_weight().T
            names = ("qweight", "qzeros", "scales", "g_idx")
            second = {name: getattr(layer, name).clone() for name in names}
            config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": is_ordered}
            name = f"{bits} bits{', in activation order' if is_ordered else ''}"
            yield f"{name}, v2", config | {"checkpoint_format": "gptq_v2"}, second, dense
            convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            yield name, config, {name: getattr(layer, name).clone() for name in names}, dense
    codes, zeros = random(depth, ROWS, low=0, high=16, seed=8), random(4, ROWS, low=0, high=16, seed=9)
    scales = (torch.rand(4, ROWS, generator=torch.Generator().manual_seed(5)) / 16).half()
    qweight, qzeros = pack_awq(codes.int(), zeros.int(), 4)
    dense = dequantize_gemm(qweight, qzeros, scales, 4, 32).T
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    yield "awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, tensors, dense


MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "gptqmodel": gptqmodel,
}


def main(name: str) -> None:
    tensors: dict[str, Tensor] = {}
    configs: dict[str, object] = {}
    for case, config, packed, dense in MAKERS[name]():
        configs[case] = config
        tensors |= {f"{case}/{key}": value.contiguous().clone() for key, value in [*packed.items(), ("dense", dense)]}
    file = Path(__file__).with_name(f"{name}.safetensors")
    save_file(tensors, file, metadata={"library": f"{name} {version(name)}", "configs": json.dumps(configs)})


if __name__ == "__main__":
    main(sys.argv[1])
