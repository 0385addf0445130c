"""The table of what formats cost in quality."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Format

from loadtest.micro import quality, requantize_gguf
from loadtest.report.environment import read_environment
from tests.support.gguf_files import make_model, state_of, write_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", "llama", state_of(make_model("llama", tied=True)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return file


def test_rows_are_measured_one_by_one_and_compared_with_the_first(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quality, "WINDOW", 100)
    folder = str(tmp_path / "rows")
    exact = f"{model},device.kernels=torch,model.dtype=float32,model.quantization=none"
    rounded = exact.replace("none", "int8")
    quality.main([folder, f"floats={exact}", "--text", str(text)])
    quality.main([folder, f"again={exact}", f"int8={rounded}", "--text", str(text)])
    quality.main([folder, f"int8={rounded}", "--text", str(text), "--save"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-3:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["floats", "again", "int8"]
    assert cells[0][2] == cells[1][2]
    assert cells[1][3:] == ["+0.00% ± 0.00", "0.0000"]
    assert float(cells[2][4]) > 0
    [file] = (tmp_path / "results").glob("*-quality.json")
    result = json.loads(file.read_text())
    assert result["window"] == 100
    assert "int8" in result["rows"][2]["kept"]


def scored(label: str, scores: list[float]) -> quality.Scored:
    return quality.Scored(
        label=label, model="m", settings="", text="t", num_tokens=len(scores) + 1, file_bytes=0, kept={},
        environment=read_environment(), scores=scores,
    )  # fmt: skip


def test_a_rise_is_that_of_the_perplexity_and_its_error_that_of_pairs() -> None:
    base, other = [-1.0, -2.0, -3.0, -6.0], [-1.1, -2.0, -3.3, -6.0]
    row = quality.compare([scored("a", base), scored("b", other)]).rows[1]
    assert row.perplexity == pytest.approx(math.exp(3.1))
    assert row.rise == pytest.approx(math.exp(0.1) - 1)
    lost = np.array([0.1, 0, 0.3, 0])
    assert row.rise_error == pytest.approx(math.exp(0.1) * lost.std(ddof=1) / 2)
    assert row.moved == pytest.approx(0.1)


def test_rows_of_different_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="b read another text than a"):
        quality.compare([scored("a", [-1.0, -1.0]), scored("b", [-1.0])])


def test_the_text_says_where_it_is_from() -> None:
    notes = (quality.TEXTS / "README.md").read_text()
    for file in quality.TEXTS.glob("*.txt"):
        assert file.name in notes
        assert 40_000 < len(file.read_text(encoding="utf-8")) < 200_000


def test_a_gguf_file_is_written_again_in_another_type(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "other.gguf"
    requantize_gguf.main([str(model), str(output), "Q8_0"])
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(output)
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert new.tensor_type == (Format.F32 if len(old.shape) == 1 else Format.Q8_0)
        found = gguf.quants.dequantize(new.data, new.tensor_type)
        np.testing.assert_allclose(found, old.data, atol=float(np.abs(old.data).max()) / 200)
    kept = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in after.fields.items() if name in kept} == kept
