"""The registry of proposers."""

import pytest

from engine.config import SpeculationConfig
from engine.speculation.proposer import PROPOSERS, build_proposer, needs_of
from tests.support.conformance.proposer import make_sequence, propose


@pytest.mark.parametrize("method", PROPOSERS)
def test_every_registered_proposer_is_built_from_the_config_and_proposes(method: str) -> None:
    proposer = build_proposer(SpeculationConfig(method=method))
    assert proposer.needs == needs_of(SpeculationConfig(method=method))
    assert proposer.needs.num_lookahead_tokens == 0
    assert propose(proposer, make_sequence([1, 2, 3, 1, 2])) == [{"none": [], "ngram": [3, 1, 2, 3]}[method]]


def test_an_unknown_method_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'oracle', but must be one of none, ngram"):
        build_proposer(SpeculationConfig(method="oracle"))
