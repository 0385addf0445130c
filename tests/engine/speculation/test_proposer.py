"""The registry of proposers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import DEFAULT_MODEL, SpeculationConfig
from engine.speculation.medusa import SHIPPED
from engine.speculation.medusa_heads import MedusaHeads
from engine.speculation.proposer import (
    PROPOSERS,
    DraftModel,
    ProposerContext,
    TargetShape,
    build_proposer,
    most_drafts,
    needs_of,
)
from tests.support.conformance.proposer import HIDDEN_SIZE, make_sequence, propose
from tests.support.faulty_device import VOCAB_SIZE
from tests.support.speculating import make_draft_model

TARGET = TargetShape(path="tiny", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_layers=2, block_size=4)


def _context() -> ProposerContext:
    def output_rows(token_ids: Tensor | None) -> Tensor:
        rows = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
        return rows if token_ids is None else rows[token_ids]

    def open_draft_model() -> DraftModel:
        return make_draft_model(40)

    return ProposerContext(
        target=TARGET,
        output_rows=output_rows,
        embedding_rows=output_rows,
        open_draft_model=open_draft_model,
        full_group=0,
        num_blocks=40,
    )


@pytest.mark.parametrize("method", sorted(set(PROPOSERS) - {"medusa", "eagle", "eagle3"}))
def test_every_registered_proposer_is_built_from_the_config_and_proposes(method: str) -> None:
    config = SpeculationConfig(method=method, model="draft" if method == "draft_model" else None, num_drafts=4)
    proposer = build_proposer(config, _context())
    assert proposer.needs == needs_of(config, TARGET)
    expected = {"ngram": [3, 1, 2, 3], "suffix": [3, 1, 2, 3]}  # a draft model needs blocks to work in
    assert propose(proposer, make_sequence([1, 2, 3, 1, 2])) == [expected.get(method, [])]


def test_an_unknown_method_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'oracle', but must be one of none, ngram, suffix"):
        build_proposer(SpeculationConfig(method="oracle"), _context())


def test_what_a_method_lacks_is_said() -> None:
    with pytest.raises(ValueError, match=r"set speculation\.model"):
        needs_of(SpeculationConfig(method="draft_model"), TARGET)
    with pytest.raises(ValueError, match=r"no heads come with tiny .*set speculation\.model"):
        build_proposer(SpeculationConfig(method="medusa"), _context())


def test_a_depth_that_is_set_is_the_number_of_drafts() -> None:
    assert most_drafts(SpeculationConfig(method="ngram", depth=3)) == 3
    assert most_drafts(SpeculationConfig(method="ngram", num_drafts=7)) == 7
    with pytest.raises(ValueError, match=r"depth \(5\) must not be above num_drafts \(4\)"):
        SpeculationConfig(method="ngram", depth=5, num_drafts=4)


@pytest.mark.parametrize("method", ["none", "ngram", "suffix"])
def test_a_model_for_a_method_that_has_none_is_refused(method: str) -> None:
    """Whoever names a draft model and forgets the method would be served without, and never hear of it."""
    with pytest.raises(ValueError, match=f"model is draft, but method is {method}, .*to draft_model, eagle3"):
        SpeculationConfig(method=method, model="draft")


def test_the_plan_counts_the_heads_that_come_with_a_model() -> None:
    """With the rows of the model's own output matrix that they take."""
    target = TargetShape(path=DEFAULT_MODEL, vocab_size=49152, hidden_size=576, num_layers=30, block_size=16)
    heads = MedusaHeads.load(
        SHIPPED / DEFAULT_MODEL,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        output_rows=lambda ids: torch.zeros(target.vocab_size if ids is None else len(ids), target.hidden_size),
    )
    num_bytes = needs_of(SpeculationConfig(method="medusa"), target).num_bytes
    assert heads.num_bytes < num_bytes < 3 * heads.num_bytes
    with pytest.raises(ValueError, match="no heads come with tiny"):
        needs_of(SpeculationConfig(method="medusa"), TARGET)


def test_the_plan_counts_heads_in_a_folder_and_heads_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "medusa_lm_head.safetensors"
    path.write_bytes(bytes(1000))
    for named in (tmp_path, path):
        assert needs_of(SpeculationConfig(method="medusa", model=str(named)), TARGET).num_bytes == 1000
