"""The heads that come with Peregrine: they fit the default model, are small, and are in what gets installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch

from engine.config import DEFAULT_MODEL
from engine.speculation.medusa_heads import MedusaHeads
from tests import ROOT

HIDDEN, VOCAB = 576, 49152  # of the default model
FOLDER = ROOT / "engine" / "speculation" / "heads" / DEFAULT_MODEL


def test_they_fit_the_default_model_and_say_how_good_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = MedusaHeads.load(
        FOLDER,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        output_rows=lambda ids: torch.randn(VOCAB if ids is None else len(ids), HIDDEN, generator=generator),
    )
    assert heads.num_heads == len(heads.accuracies) >= 3
    assert heads.has_correction
    assert 1000 <= heads.num_known_tokens < VOCAB
    ids, log_probs = heads.propose(torch.randn(2, HIDDEN, generator=generator), torch.tensor([5, VOCAB - 1]), 4)
    assert bool(((ids >= 0) & (ids < VOCAB)).all())
    assert bool(log_probs.isfinite().all())
    for ranks in heads.accuracies:
        assert list(ranks[:4]) == sorted(ranks[:4], reverse=True)
        assert 0 < sum(ranks) < 1


def test_they_are_small_and_say_how_they_were_made() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10_000_000
    assert "peregrine train-heads" in (FOLDER / "README.md").read_text()


def test_they_are_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "engine" / "speculation"
    installed = {file for pattern in settings["engine.speculation"] for file in package.glob(pattern)}
    assert {Path(FOLDER / name) for name in ("config.json", "model.safetensors", "README.md")} <= installed
