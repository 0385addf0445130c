"""The same as `engine_times`, as a client sees it: a server process, HTTP, and the load generator."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from loadtest.gpu.context import Context, Job
from loadtest.gpu.end_to_end import Case, allow, cases_of, decode_floor
from loadtest.gpu.model_folder import model_folder
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.shapes import Load, Shape, load_of
from loadtest.session import load as load_session

_NUM_ROUNDS = 2  # times that each stream has a request


def jobs(context: Context) -> list[Job]:
    load = load_of(is_rehearsal=context.is_rehearsal)
    return [
        Job(f"{shape.name} over HTTP", partial(_time, context, shape, load, num_jobs_left=len(load.shapes) - number))
        for number, shape in enumerate(load.shapes)
    ]


def _time(context: Context, shape: Shape, load: Load, *, num_jobs_left: int) -> Iterator[Record]:
    allowance = allow(context, num_jobs_left=num_jobs_left, overhead=5.0)
    started = time.perf_counter()
    with model_folder(shape, max_length=load.max_length) as folder, _server(context, folder, load) as url:
        yield Timing(f"start over HTTP, {shape.name}", time.perf_counter() - started)
        for case in cases_of(load):
            if allowance.has_room_for(shape, case, _NUM_ROUNDS * load.num_outputs):
                yield from _time_case(context, shape, case, url, num_outputs=load.num_outputs)
            else:
                yield Problem(f"{shape.name}, {case}, over HTTP", "left out for want of time")


@contextmanager
def _server(context: Context, folder: Path, load: Load) -> Iterator[str]:
    """Its address, once it is ready. RuntimeError with its last line if it never is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--set", "model.load_format=dummy", "--set", f"scheduler.max_num_seqs={max(load.batches)}"]
    if context.is_rehearsal:
        command += ["--set", "device.name=cpu", "--set", "device.num_threads=1", "--set", "device.kernels=torch"]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, log, context)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, context: Context) -> None:
    while True:
        if process.poll() is not None or context.seconds_left < 0:
            lines = log.read_text(errors="replace").splitlines()
            raise RuntimeError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")
        try:
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def _time_case(context: Context, shape: Shape, case: Case, url: str, *, num_outputs: int) -> Iterator[Record]:
    title = f"{shape.name}, {case}, over HTTP"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        arguments = {
            "--url": url,
            "--concurrency": case.batch,
            "--requests": _NUM_ROUNDS * case.batch,
            "--warmup": min(2, case.batch),
            "--prompt": case.length,
            "--output": num_outputs,
            "--token-ids": f"1:{shape.vocab_size - 1}",
            "--json": path,
        }
        command = [sys.executable, "-m", "loadtest", "run", *(str(part) for pair in arguments.items() for part in pair)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            yield Problem(title, f"loadtest ended with {result.returncode}: {lines[-1] if lines else ''}")
            return
        (measurement,) = load_session(path).measurements
    figures = measurement.figures
    note = f"{figures.output_tokens_per_second:,.0f} tokens/s with prefill"
    if figures.time_per_output_token is not None:
        floor = decode_floor(context, shape, case, num_outputs / 2)
        seconds = figures.time_per_output_token.p50
        yield Timing(f"time per token, {title}", seconds, floor, num_tokens=case.batch, note=note)
    if figures.time_to_first_token is not None:
        yield Timing(f"time to first token, {title}", figures.time_to_first_token.p50)
