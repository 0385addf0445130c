"""Typical acceptance, which is lossy: its definition, and what it never breaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.batch.step_inputs import RowFacts, TypicalInputs
from engine.config import EngineConfig
from engine.lazy_import import load_object
from engine.planning.lossy import check_lossy, lossy_notes
from engine.planning.resolve import SettingError
from engine.sampling.sampler import SAMPLERS
from engine.sampling.typical import TypicalRule, accept_typical, are_typical, typical_inputs
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.answers import answer_all
from tests.support.speculating import make_engine
from tests.support.stepping import step_inputs

RULE = TypicalRule(0.09, 0.3)


def facts(
    num_rows: int, *, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 40, top_p: float = 1.0
) -> RowFacts:
    gap = -math.log(min_p) if min_p else math.inf
    return RowFacts(
        seeds=np.zeros(num_rows, dtype=np.uint64),
        temperatures=np.full(num_rows, temperature, dtype=np.float32),
        max_gaps=np.full(num_rows, gap, dtype=np.float32),
        top_ks=np.full(num_rows, top_k),
        top_ps=np.full(num_rows, top_p),
        edits_before=np.zeros(num_rows),
        seq_of_row=np.zeros(num_rows, dtype=np.int64),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits", [{}, {"temperature": 0.6}, {"min_p": 0.3}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 6, "top_p": 0.6}]
)
def test_a_draft_is_kept_where_its_probability_is_above_the_bound(seed: int, limits: dict[str, float]) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    pairs = [(row, token) for row in range(5) for token in range(40)]
    places, tokens = np.array(pairs).T
    inputs = TypicalInputs(np.arange(5), places, np.arange(1, len(pairs) + 1), tokens, *RULE)
    found = are_typical(logits, inputs, facts(5, **limits)).reshape(5, 40).numpy()
    chances = (logits.double() / limits.get("temperature", 1.0)).softmax(-1).numpy()
    num_kept = 0
    for row, is_kept in zip(chances, found, strict=True):
        entropy = -(row * np.log(row)).sum()
        order = np.argsort(-row)
        left = [token for token in order if row[token] >= limits.get("min_p", 0.0) * row.max()][
            : limits.get("top_k", 40)
        ]
        before = np.cumsum(row[left]) - row[left]
        left = [
            token for token, mass in zip(left, before, strict=True) if mass < limits.get("top_p", 1.0) * row[left].sum()
        ]
        expected = {token for token in left if row[token] > min(0.09, 0.3 * math.exp(-entropy))}
        assert set(np.flatnonzero(is_kept)) == expected
        num_kept += len(expected)
    assert num_kept >= 4


def test_the_longest_path_is_kept_and_of_equals_the_one_that_was_sampled() -> None:
    #         0: 5      1: 6 (sampled)
    #      2: 7   3: 8      4: 9
    tokens, parents = [5, 6, 7, 8, 9], [-1, -1, 0, 0, 1]
    sampled = [6, 8, 1, 2, 3, 4]
    assert accept_typical(sampled, tokens, parents, [False] * 5) == [1]
    assert accept_typical(sampled, tokens, parents, [True, False, False, False, False]) == [0, 3]
    assert accept_typical(sampled, tokens, parents, [True, False, True, False, True]) == [0, 3]
    assert accept_typical([6, 8, 1, 2, -1, 4], tokens, parents, [True] * 5) == [1, 4]  # after 3 nothing can be sampled
    assert accept_typical([5, 8, 1, 2, 3, 4], tokens, parents, [True] * 5) == [0, 3]
    assert accept_typical([1, 1, 1, 1, 1, 1], tokens, parents, [False] * 5) == []


def _item(drafts: list[int], parents: list[int], **fields: object) -> Scheduled:
    params = SamplingParams(**{"seed": 1, "max_tokens": 50, **fields})
    seq = Sequence(Request(request_id="r", prompt_token_ids=[1, 2, 3], params=params), [1, 2, 3], num_computed_tokens=2)
    seq.draft_token_ids, seq.draft_parents, seq.block_tables = drafts, parents, [[1, 2, 3]]
    return Scheduled(seq, 1 + len(drafts), len(drafts), samples=True)


def test_greedy_requests_and_those_that_want_log_probabilities_are_verified_exactly() -> None:
    batch = [
        _item([4, 5], [-1, 0], temperature=0.0),
        _item([6, 7, 8], [-1, -1, 1]),
        _item([], []),
        _item([9], [-1], logprobs=0),
        _item([10], [-1], top_p=0.9),
    ]
    inputs = typical_inputs(batch, RULE, 1e-5)
    assert inputs is not None
    assert inputs.tokens.tolist() == [6, 7, 8, 10]
    assert inputs.drafts.tolist() == [4, 5, 6, 11]
    assert inputs.rows[inputs.places].tolist() == [3, 3, 5, 10]
    assert typical_inputs(batch[:1], RULE, 1e-5) is None


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_keeps_the_same_drafts(kind: str) -> None:
    """Bans and bias come first; what is kept stands in the answer in place of what was sampled."""
    sampler = load_object(SAMPLERS[kind])(40)
    batch = [
        _item([4, 5], [-1, 0], bad_words=[[4]], logit_bias={7: 9.0}),
        _item([6, 7, 8], [-1, -1, 1], top_k=5),
        _item([9], [-1], temperature=0.0),
    ]
    logits = torch.full((9, 40), -3.0)
    logits[:, :12] = 0.0
    logits[3, [6, 7]] = 2.5
    inputs = step_inputs(batch, 4, typical=RULE)
    found = sampler.launch(logits, inputs.sampling).finish(inputs)
    assert found[0].accepted == []  # 4 is banned, and 5 follows it
    assert found[1].accepted[0] in (0, 1)
    assert found[1].token_ids[0] == [6, 7][found[1].accepted[0]]
    if found[1].accepted == [1, 2]:
        assert found[1].token_ids[:2] == [7, 8]
    assert found[2].token_ids == [0]


def _requests(**fields: object) -> list[Request]:
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=[1 + i % 5, 2, 3, 1 + i % 5, 2],
            params=SamplingParams(**{"seed": i, "max_tokens": 30, "temperature": 0.9, **fields}),
        )
        for i in range(12)
    ]


@pytest.mark.parametrize("method", ["ngram", "draft_model", "medusa", "eagle3"])
def test_more_drafts_are_kept_and_nothing_that_is_forbidden_is_said(method: str) -> None:
    exact = answer_all(make_engine(method), _requests())
    lossy = answer_all(make_engine(method, typical=TypicalRule(0.05, 0.5)), _requests())
    assert lossy.num_accepted_drafts > exact.num_accepted_drafts
    assert lossy.tokens != exact.tokens
    assert all(len(tokens) == 30 for tokens in lossy.tokens.values())
    limited = _requests(allowed_token_ids=[1, 2, 3, 4], bad_words=[[4]])
    said = answer_all(make_engine(method, typical=TypicalRule(1e-9, 1e-9)), limited).tokens
    assert {token for tokens in said.values() for token in tokens} <= {1, 2, 3}


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"logprobs": 2}, {"top_k": 1}])
def test_what_must_be_exact_stays_so(fields: dict[str, object]) -> None:
    engine = make_engine("medusa", typical=TypicalRule(1e-9, 1e-9))
    assert answer_all(engine, _requests(**fields)).tokens == answer_all(make_engine("none"), _requests(**fields)).tokens


def test_it_is_off_by_default_and_refused_where_it_contradicts() -> None:
    assert EngineConfig().lossy_speculation.acceptance == "exact"
    check_lossy(EngineConfig())
    assert lossy_notes(EngineConfig()) == []
    lossy = {"acceptance": "typical"}
    with pytest.raises(SettingError, match=r"device\.determinism is strict, which promises"):
        check_lossy(
            EngineConfig.model_validate(
                {"lossy_speculation": lossy, "speculation": {"method": "ngram"}, "device": {"determinism": "strict"}}
            )
        )
    with pytest.raises(SettingError, match=r"method is none, so there are no drafts"):
        check_lossy(EngineConfig.model_validate({"lossy_speculation": lossy}))
    config = EngineConfig.model_validate({"lossy_speculation": lossy, "speculation": {"method": "ngram"}})
    check_lossy(config)
    assert "LOSSY" in lossy_notes(config)[0]
