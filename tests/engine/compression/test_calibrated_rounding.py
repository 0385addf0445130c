"""GPTQ and AWQ, in an environment of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from engine.compression.calibrated_rounding import CalibrationJob
from engine.compression.calibration_environment import environment_folder, find_python, make_environment
from engine.compression.checkpoint_job import QuantizeJob
from engine.compression.quantization_config import quantization_config
from engine.compression.weight_scheme import WeightScheme
from engine.config import ModelConfig
from engine.models.model_error import ModelError
from tests.support.loaded_models import load_plain, weights_of
from tests.support.quantized_files import write_checkpoint

TEXT = [[(7 * i + j * j) % 256 for j in range(64)] for i in range(8)]


def test_what_the_library_said_last_is_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This environment has no llmcompressor, which is as good as any other failure."""
    config = quantization_config({"model.layers.0.mlp.up_proj": WeightScheme(4, 32)}, ["lm_head"])
    job = CalibrationJob(
        model=tmp_path, output=tmp_path / "work" / "result", method="gptq", sequences=TEXT, config=config,
        dtype="bfloat16",
    )  # fmt: skip
    job.output.parent.mkdir()
    with pytest.raises(ModelError, match=r"llmcompressor failed on .*: ModuleNotFoundError: No module named"):
        job.run(Path(sys.executable))
    assert "Traceback" in capsys.readouterr().err
    asked = json.loads((tmp_path / "work" / "calibration.json").read_text())
    assert asked["config_groups"]["group_0"]["weights"]["scale_dtype"] == "torch.bfloat16"
    assert "scale_dtype" not in config["config_groups"]["group_0"]["weights"]  # type: ignore[index]


def test_an_environment_that_was_not_finished_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path))
    (environment_folder() / "bin").mkdir(parents=True)
    with pytest.raises(ModelError, match="add --make-environment"):
        find_python()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_the_library_rounds_is_served(method: str, tmp_path: Path) -> None:
    """Makes the environment in the cache, if it is not there."""
    model = tmp_path / "model"
    write_checkpoint(model, {}, None, dtype=torch.bfloat16)
    make_environment()
    scheme = WeightScheme(4, 32)
    written = QuantizeJob(
        model=ModelConfig(path=str(model)), output=tmp_path / "output", scheme=scheme, method=method, sequences=TEXT
    ).run()
    assert len(written.schemes) == 14
    config = json.loads((tmp_path / "output" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    before, after = (weights_of(load_plain(folder)) for folder in (model, tmp_path / "output"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert 0 < (before[name] - after[name]).abs().max() < before[name].abs().max()
