"""Every architecture against transformers' own forward, through chunked prefill and paged decode in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from engine.models.registry import build_model
from tests.support.model_cases import FALLBACK, OWN, assert_same_logits, checkpoint, logits_of, prompts, reference


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.parametrize("name", OWN)
def test_own_layers_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    assert_same_logits(OWN[name], tmp_path, "own")


@pytest.mark.parametrize("name", FALLBACK)
def test_fallback_computes_on_paged_blocks_what_transformers_computes(name: str, tmp_path: Path) -> None:
    assert_same_logits(FALLBACK[name], tmp_path, "transformers")


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3 longrope, long"])
def test_bfloat16_stays_close_to_float32(name: str, tmp_path: Path) -> None:
    case = OWN[name]
    weights = checkpoint(reference(case.config), tmp_path)
    sequences = prompts(case.lengths)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(case.config, dtype=dtype, implementation="own")
        model.load_weights(weights.items())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        logits.append(torch.cat(logits_of(model, sequences)))
    assert logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).square().mean() < 0.03**2 * logits[0].square().mean()
