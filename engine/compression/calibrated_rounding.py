"""GPTQ and AWQ by llmcompressor, in a process of the environment that it needs.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds a matrix column by column and makes up for each error in those to
come; AWQ (Lin et al. 2023, arXiv 2306.00978) scales inputs that matter before it rounds. Both learn from a text.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import engine.compression.calibration_driver as driver
from engine.client.environment import engine_environment
from engine.models.model_error import ModelError
from engine.quantization.method import has_fast_bf16

Method = Literal["gptq", "awq"]
_SHOWN = 20  # lines of a failure
_PROGRESS = re.compile(rb"\((\d+)/(\d+)\): Calibrating")


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """model: a directory of floats; sequences: token ids of the text; config: as `quantization_config` makes it

    dtype: of scales, and of what is not quantised
    """

    model: Path
    output: Path
    method: Method
    sequences: Sequence[Sequence[int]]
    config: dict[str, object]
    dtype: str
    seed: int = 0

    def run(self, python: Path) -> None:
        """Writes config and weights into `output`. ModelError, with what the library said last, where it fails."""
        job = {
            "model": str(self.model),
            "output": str(self.output),
            "method": self.method,
            "sequences": [list(ids) for ids in self.sequences],
            "config_groups": _with_scales_of(self.config["config_groups"], self.dtype),
            "ignore": self.config["ignore"],
            "dtype": self.dtype,
            "computed_in": computed_in(self.dtype),
            "seed": self.seed,
            "num_threads": torch.get_num_threads(),
        }
        self.output.mkdir(exist_ok=True)
        file = self.output.parent / "calibration.json"
        log = self.output.parent / "calibration.log"
        file.write_text(json.dumps(job), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment = engine_environment(os.environ, None) | offline
        environment.pop("PYTHONPATH", None)  # packages of other releases
        command = [str(python), str(Path(driver.__file__)), str(file)]
        code = _run(command, environment, log)
        if code != 0:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            print("\n".join(lines[-_SHOWN:]), file=sys.stderr)
            reason = "it was killed, maybe for its memory" if code < 0 else lines[-1][:300] if lines else "no reason"
            raise ModelError(f"llmcompressor failed on {self.model}: {reason}")


def computed_in(dtype: str) -> str:
    """The dtype that layers run in: float32 on a CPU that does not multiply 16 bits."""
    return dtype if torch.cuda.is_available() or has_fast_bf16() else "float32"


def _with_scales_of(groups: object, dtype: str) -> object:
    """The groups of a config, whose scales are rounded to a dtype whatever layers run in."""
    assert isinstance(groups, dict)
    scales = {"scale_dtype": f"torch.{dtype}"}
    return {name: {**group, "weights": {**group["weights"], **scales}} for name, group in groups.items()}


def _run(command: list[str], environment: Mapping[str, str], log: Path) -> int:
    """The exit code. Everything that it says goes to `log`, and its progress to a bar; ends with this process."""
    with (
        subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        ) as process,
        log.open("wb") as out,
        tqdm(total=1, desc="calibration", unit="layer", disable=None) as bar,
    ):
        assert process.stdout is not None
        try:
            while piece := process.stdout.read(1 << 16):
                out.write(piece)
                for match in _PROGRESS.finditer(piece):
                    bar.total, bar.n = int(match[2]), int(match[1]) - 1
                    bar.refresh()
        except BaseException:
            process.kill()
            raise
        return process.wait()
