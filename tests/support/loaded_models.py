"""Models loaded from files for a test, as an engine would, and what became of their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.loading.loader import load_model, read_model_facts
from engine.models.llama import TokenTable
from engine.models.model import Model
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import read_machine
from engine.quantization.linear import KeptMatrix
from engine.runner.kernel_backend import KernelBackend


def plan_of(path: Path, *, kernels: str = "auto", **settings: str) -> MemoryPlan:
    model = {"path": str(path), **settings}
    config = EngineConfig.model_validate(
        {"model": model, "device": {"name": "cpu", "num_threads": 2, "kernels": kernels}}
    )
    return plan_memory(read_model_facts(config.model), config, read_machine())


def load_compiled(path: Path, **settings: str) -> Model:
    """For compiled layers, with two threads that pack."""
    plan = plan_of(path, **settings)
    assert plan.kernels == "numba"
    methods = KernelBackend(plan, is_strict=False).linear_methods
    return load_model(plan.model_config, dtype=plan.dtype, seed=0, methods=methods).model


def load_plain(path: Path, **settings: str) -> Model:
    """As floats in torch's layers."""
    config = ModelConfig.model_validate({"path": str(path), **settings})
    return load_model(config, dtype=torch.float32, seed=0).model


def weights_of(model: Model) -> dict[str, Tensor]:
    """Every weight in float32, matrices as they are multiplied, by a checkpoint's names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, KeptMatrix):
            parent = name.rpartition(".")[0]
            for part in module.spec.parts:
                place = f"{parent}.{part.name}" if part.name else name
                found[f"{place}.weight"] = module.dense(module.spec.rows(part.name)).float()
        elif isinstance(module, TokenTable) and module.table is not None:
            found[f"{name}.weight"] = module.table.rows(torch.arange(module.num_embeddings))
    for name, parameter in model.named_parameters():
        if name not in found and not isinstance(model.get_submodule(name.rpartition(".")[0]), KeptMatrix):
            found[name] = parameter.data.float()
    outer = ("lm_head.", "decoder.", "head.")
    return {_named(name) if name.startswith(outer) else f"model.{name}": weight for name, weight in found.items()}


def _named(name: str) -> str:
    """Of transformers' layers: the decoder's without its place here, the output layer as it is called elsewhere."""
    return name.replace("decoder.", "model.", 1).removeprefix("head.")


def kept_as(model: Model, *, layer: int = 0) -> dict[str, str]:
    """How the matrices of one layer are kept, by the last words of their names; and the output layer's."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, KeptMatrix) and (f"layers.{layer}." in name or name == "lm_head"):
            found[name.rpartition(".")[2]] = module.describe()
    return found
