"""Every family that transformers has is computed as transformers does, or refused in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from engine.loading.text_part import text_config
from engine.models.registry import build_model
from tests.support.model_cases import SIZES, Case, assert_same_logits

MAX_NUM_PARAMETERS = 20_000_000  # of a family whose parts keep their sizes, whatever the config says
NOT_FOR_USERS = ("NoneType", "KeyError(", "meta tensors", "object has no attribute", "s_aux", "Traceback", "\n")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def tiny_config(family: str) -> PreTrainedConfig:
    """With whatever sizes the family has fields for."""
    sizes = dict(SIZES, pad_token_id=0)
    try:
        return AutoConfig.for_model(family, **sizes, head_dim=8)
    except Exception:  # some have no such field, or rules for it
        try:
            return AutoConfig.for_model(family, **sizes)
        except Exception as error:
            pytest.skip(f"no config of these sizes: {error}")


def refusal(config: PreTrainedConfig) -> str | None:
    """Why it is not served; None where it is."""
    try:
        with torch.device("meta"):
            build_model(text_config(config), dtype=torch.float32)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_family_is_computed_as_transformers_does_or_refused_in_words(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    reason = refusal(config)
    if reason is not None:
        assert len(reason) < 400
        assert not any(part in reason for part in NOT_FOR_USERS)
        return
    config = text_config(config)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in build_model(config, dtype=torch.float32).parameters())
    if num_parameters > MAX_NUM_PARAMETERS:
        pytest.skip("no tiny model of it")
    assert_same_logits(Case(config), tmp_path, "auto")
