"""`peregrine doctor`: what this machine has, which kernel each part of a model will use, and how its chats are read."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from engine.ipc.messages import EXIT_CODES
from server.cli.chat_format import chat_format
from server.complain import complain
from server.settings import LoadedConfig
from server.version import VERSION

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.planning.machine import Machine

PACKAGES = ("torch", "transformers", "tokenizers", "numba", "triton", "fastapi", "uvicorn")
NAMESAKE = "kernels"  # a distribution of Hugging Face, whose package has the name of a folder of ours
Row = tuple[str, str]


def doctor(loaded: LoadedConfig) -> int:
    """Prints what it finds; exit code 2 where a setting does not go with this machine, or a package with ours."""
    for name, value in software():
        print(f"{name:<24} {value}")
    if clash := name_clash():  # before anything is imported that might find the wrong one
        complain(clash)
        return EXIT_CODES["config"]
    for name, value in [*machine(), *default_model()]:
        print(f"{name:<24} {value}")
    try:
        rows = list(kernels(loaded))
    except ValueError as error:
        complain(f"{getattr(error, 'kind', 'config')}: {error}")
        return EXIT_CODES["config"]
    for name, value in rows:
        print(f"{name:<24} {value}")
    return 0


def software() -> Iterator[Row]:
    yield "peregrine", VERSION
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield name, _installed(name)


def name_clash() -> str | None:
    """What to do where Hugging Face's `kernels` is installed beside ours; None where it is not.

    Only one package can have the name: either our kernels are not found, or transformers, which imports its own
    wherever their metadata are, finds ours.
    """
    try:
        found = version(NAMESAKE)
    except PackageNotFoundError:
        return None
    return (
        f"the package {NAMESAKE} {found} of Hugging Face is installed beside Peregrine, whose own package has the same "
        f"name, and Python imports only one of them: python -m pip uninstall {NAMESAKE}, and install Peregrine again, "
        "or give Peregrine an environment of its own"
    )


def machine() -> Iterator[Row]:
    from engine.planning.ceilings import with_ceilings
    from engine.planning.machine import read_machine

    found = read_machine()
    found = with_ceilings(found, found.device)
    yield "cpu", f"{found.cpu_name}, {found.num_cores} cores, {found.num_threads} threads of ours"
    bfloat16 = "multiplies bfloat16" if found.has_fast_bf16 else "emulates bfloat16"
    yield "cpu instructions", f"{'AVX-512' if found.has_avx512 else 'no AVX-512'}, {bfloat16}"
    gpu = found.gpu
    yield (
        "gpu",
        "none" if gpu is None else f"{gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}",
    )
    yield (
        "memory",
        f"{found.available_bytes / 2**30:.1f} GiB free of {found.total_bytes / 2**30:.1f} GiB ({found.device})",
    )
    ceilings = found.ceilings
    yield (
        "measured ceilings",
        f"{ceilings.bytes_per_second / 1e9:.1f} GB/s read, {ceilings.flops_per_second / 1e9:.0f} GFLOP/s in "
        f"{'float32' if gpu is None else 'bfloat16'}",
    )


def default_model() -> Iterator[Row]:
    from engine.loading.default_model import SMOLLM2, cache_directory

    path = cache_directory() / "models" / SMOLLM2.name / Path(SMOLLM2.member).name
    is_there = path.is_file() and path.stat().st_size == SMOLLM2.num_bytes
    yield "default model", f"{SMOLLM2.name}: {path if is_there else 'not fetched yet; the first start does it'}"


def kernels(loaded: LoadedConfig) -> Iterator[Row]:
    """For the configured dtype and weight format, and a model of Llama's kind; of a directory, what its headers say of
    quantised weights too; and how its answers are taken apart.

    Raises ValueError for settings that this machine cannot honour.
    """
    import torch

    from engine.planning.machine import describe_compiled_kernels, describe_kernels, read_machine
    from engine.planning.resolve import resolve_device, resolve_dtype, resolve_kernels, resolve_quantization
    from engine.planning.sizes import DTYPES
    from engine.planning.triton_check import describe_triton_kernels
    from engine.quantization.method import formats_of

    config, found = loaded.config.engine_config(), read_machine()
    device = resolve_device(config, found)
    chosen = resolve_kernels(config, device.value, why_not_compiled="")
    dtype = resolve_dtype(config, found, device.value, chosen.value)
    quantization = resolve_quantization(config, found, device.value, chosen.value, dtype.value)
    yield "device", f"{device.value} ({device.setting.reason or device.setting.source})"
    yield "dtype", f"{dtype.value} ({dtype.setting.reason or dtype.setting.source})"
    yield "quantization", f"{quantization.value} ({quantization.setting.reason or quantization.setting.source})"
    yield "weight formats", ", ".join(formats_of(chosen.value))
    yield "kernels", f"{chosen.value} ({chosen.setting.reason or chosen.setting.source})"
    if chosen.value == "triton":
        parts = describe_triton_kernels(
            torch.device(device.value), DTYPES[dtype.value], quantization=quantization.value
        )
    elif chosen.value == "numba":
        parts = describe_compiled_kernels(found, quantization=quantization.value)
    else:
        parts = describe_kernels(found, dtype=DTYPES[dtype.value], quantization=quantization.value)
    for part, kernel in parts.items():
        yield f"  {part}", kernel
    if Path(config.model.path).is_dir():
        yield from _stored_weights(config, found)
    yield from chat_format(config.model)


def _stored_weights(config: EngineConfig, machine: Machine) -> Iterator[Row]:
    """What becomes of the quantised weights of a directory; from its headers."""
    from engine.loading.loader import read_model_facts
    from engine.planning.engine_plan import plan_memory
    from engine.planning.sizes import PlanError

    facts = read_model_facts(config.model)
    try:
        plan = plan_memory(facts, config, machine)
    except PlanError:
        return  # `peregrine plan` says why
    for note in plan.stored_notes:
        yield "stored weights", note


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
