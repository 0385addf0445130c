"""Is memory what the plan says? `python -m loadtest.micro.memory [--shapes Qwen3-0.6B] [--containers gptq] [--save]`

For shapes of published models, whose checkpoints are written here with integers of noise: the peak while a model is
loaded, and what the server's engine holds while it answers, beside the figures of `peregrine plan`. Memory is a
process's own (RssAnon in Linux's /proc): pages of a file that is read are the system's to take, and are told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from engine.config import EngineConfig
from engine.loading.loader import read_model_facts
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import read_machine
from loadtest.client.client import Client, Target
from loadtest.client.discovery import first_model
from loadtest.client.outcome import Answer
from loadtest.compare.processes import tree_of
from loadtest.micro.measure import RESULTS, Row, print_table
from loadtest.micro.own_server import HIGHEST_ID, LOWEST_ID, own_server
from loadtest.micro.shapes import LLAMA_1B, QWEN_600M, QWEN_1700M, Shape
from loadtest.micro.synthetic import write_floats, write_gguf, write_gptq
from loadtest.report.environment import read_environment
from loadtest.workload.prompts import Exchange

SHAPES = {shape.name: shape for shape in (LLAMA_1B, QWEN_600M, QWEN_1700M)}
CONTAINERS: dict[str, Callable[[Path, Shape], Path]] = {
    "GGUF Q4_K_M": lambda folder, shape: write_gguf(folder / "model.gguf", shape),
    "GPTQ int4": lambda folder, shape: write_gptq(folder / "gptq", shape),
    "bfloat16": lambda folder, shape: write_floats(folder / "bfloat16", shape),
}
_KV_TOKENS, _LENGTH, _NUM_SEQS = 4096, 1024, 8
_INTERVAL = 0.002  # seconds between two looks at a process
_LOAD = """
import json, sys
from loadtest.micro.memory import load_once
print(json.dumps(load_once(sys.argv[1])))
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    rows = []
    for name in options.shapes:
        for container in options.containers:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                rows.append(measure(SHAPES[name], container, Path(folder), num_threads=options.threads))
            print_table([rows[-1]])
    print()
    print_table(rows)
    if options.save:
        print(f"\n{_save(rows)}")
    return 0


def _save(rows: list[Row]) -> Path:
    """Rows of other shapes and containers stay in the file, each with the commit that it was measured at."""
    path, environment = RESULTS / "micro-memory.json", read_environment()
    before: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {(row["shape"], row["container"]) for row in rows}
    kept = [row for row in before if (row["shape"], row["container"]) not in measured]
    rows = [*kept, *({**row, "commit": environment.commit} for row in rows)]
    RESULTS.mkdir(exist_ok=True)
    record = {"environment": asdict(environment), "unit": "bytes, but for ratios", "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def measure(shape: Shape, container: str, folder: Path, *, num_threads: int) -> Row:
    path = CONTAINERS[container](folder, shape)
    config = _config(path, num_threads)
    facts = read_model_facts(config.model)
    plan = plan_memory(facts, config, read_machine())
    command = [sys.executable, "-c", _LOAD, config.model_dump_json()]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    largest = 4 * max(matrix.num_weights for matrix in facts.matrices)
    planned = plan.process_bytes + plan.weight_bytes + plan.workspace_bytes + plan.kv_bytes
    serving = _serve(path, num_threads, plan)
    return {
        "shape": shape.name,
        "container": container,
        "file": sum(file.stat().st_size for file in [path, *path.glob("*.safetensors")] if file.is_file()),
        "weights, planned": plan.weight_bytes,
        "stays": loaded["kept"],
        "peak, planned": plan.loading_bytes,
        "peak": loaded["peak"],
        "peak of (what stays + the largest matrix)": loaded["peak"] / (loaded["kept"] + largest),
        "planned of peak": plan.loading_bytes / loaded["peak"],
        "planned of what stays": plan.weight_bytes / loaded["kept"],
        "serving, planned": planned,
        "serving": serving["own"],
        "planned of serving": planned / serving["own"],
        "resident while serving": serving["resident"],
    }


def _config(path: Path, num_threads: int) -> EngineConfig:
    sections = {
        "model": {"path": str(path), "max_model_len": _LENGTH},
        "device": {"name": "cpu", "num_threads": num_threads},
        "kv_cache": {"memory": f"{_KV_TOKENS}tokens"},
        "scheduler": {"max_num_seqs": _NUM_SEQS},
    }
    return EngineConfig.model_validate(sections)


def load_once(text: str) -> dict[str, int]:
    """What a load takes in this process, as an engine does it: bytes at its peak, and those that stay."""
    import torch

    from engine.loading.loader import load_model
    from engine.planning.machine import freeing_at_once
    from engine.runner.kernel_backend import KernelBackend

    config = EngineConfig.model_validate_json(text)
    plan = plan_memory(read_model_facts(config.model), config, read_machine())
    back_end = KernelBackend(plan, is_strict=False)
    back_end.compile()
    torch.set_num_threads(plan.num_threads)
    before = own_bytes(psutil.Process().pid)
    with freeing_at_once(), watching(psutil.Process().pid) as seen:
        loaded = load_model(plan.model_config, dtype=plan.dtype, seed=0, methods=back_end.linear_methods)
        back_end.prepare(loaded.model)
    return {"peak": max(seen) - before, "kept": own_bytes(psutil.Process().pid) - before}


def own_bytes(pid: int) -> int:
    """A process's memory that is no page of a file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ValueError("this system does not tell a process's own memory")


@contextmanager
def watching(pid: int) -> Iterator[list[int]]:
    """A list to which the process's own memory is added, again and again, within the block."""
    seen, done = [own_bytes(pid)], threading.Event()

    def look() -> None:
        while not done.wait(_INTERVAL):
            seen.append(own_bytes(pid))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield seen
    finally:
        done.set()
        looking.join()
        seen.append(own_bytes(pid))


def _serve(path: Path, num_threads: int, plan: MemoryPlan) -> dict[str, int]:
    """What the engine's process holds after it has answered as many long requests as fit."""
    settings = {
        "model.max_model_len": f"{_LENGTH}",
        "device.num_threads": f"{num_threads}",
        "kv_cache.memory": f"{_KV_TOKENS}tokens",
        "scheduler.max_num_seqs": f"{_NUM_SEQS}",
    }
    arguments = [str(path), *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]
    with own_server(arguments) as url:
        asyncio.run(_answer(url, plan))
        engine = _largest_listening(url)
        return {"own": own_bytes(engine.pid), "resident": engine.memory_info().rss}


def _largest_listening(url: str) -> psutil.Process:
    """Of the server's processes, the one with most memory: its engine."""
    port = int(url.rpartition(":")[2])
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    (root,) = {one.pid for one in listening if one.pid is not None and getattr(one.laddr, "port", None) == port}
    return max(tree_of(root), key=lambda process: process.memory_info().rss)


async def _answer(url: str, plan: MemoryPlan) -> None:
    target = Target(url)
    target = Target(url, model=await first_model(target))
    num_ids = HIGHEST_ID - LOWEST_ID
    length = min(plan.max_num_batched_tokens, _LENGTH - 40)
    prompts = [[LOWEST_ID + (7 * i * n) % num_ids for i in range(length)] for n in range(1, 1 + _KV_TOKENS // _LENGTH)]
    async with Client(target) as client:
        answers = await asyncio.gather(*(client.send(Exchange(prompt, 16)) for prompt in prompts))
    failed = [answer for answer in answers if not isinstance(answer, Answer)]
    if failed:
        raise RuntimeError(f"the server does not answer: {failed[0]}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.micro.memory", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--containers", nargs="+", choices=CONTAINERS, default=list(CONTAINERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written, and removed (the system's for such)"
    )
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
