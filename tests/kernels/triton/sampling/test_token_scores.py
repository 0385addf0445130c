"""Penalties and log-probabilities on the device: the definitions, and what the engine does on a CPU."""

import numpy as np
import pytest
import torch

import kernels.reference.sampling
from engine.batch.step_inputs import LogprobInputs
from engine.sampling.logit_processors import penalise
from engine.sampling.logprobs import ask_logprobs, read_logprobs
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.triton.sampling import token_scores
from tests.support.stepping import step_inputs

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to infinity, as it should
VOCAB_SIZE = 100


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "_TOKENS_AT_ONCE", 32)


def test_penalties_have_the_bits_of_the_engine_s(device: torch.device) -> None:
    penalties = [(1.3, 0.7, 0.1), (0.8, 0.0, 0.0), (1.0, -0.3, 1.9), (1.0, 0.0, 0.0), (1e-38, 0.0, 0.0)]
    num_rows = len(penalties)
    logits = 5 * torch.randn(num_rows, VOCAB_SIZE)
    logits[:, 5] = -torch.inf
    counts = torch.zeros(num_rows, VOCAB_SIZE, dtype=torch.int32)
    is_in_prompt = torch.zeros(num_rows, VOCAB_SIZE, dtype=torch.bool)
    batch = []
    for state, (repetition, frequency, presence) in enumerate(penalties):
        prompt, output = torch.randint(0, VOCAB_SIZE, (2, 30)).tolist()
        is_in_prompt[state, prompt] = True
        for token in output:
            counts[state, token] += 1
        params = SamplingParams(
            seed=0,
            max_tokens=1,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        request = Request(request_id="a", prompt_token_ids=prompt, params=params)
        seq = Sequence(request, prompt + output, num_computed_tokens=len(prompt + output) - 1)
        seq.block_tables = [[1] * 10]
        batch.append(Scheduled(seq, 1, 0, samples=True))
    expected = logits.clone()
    edits = {one.row: one for one in step_inputs(batch, 16).sampling.edits}
    assert len(edits) == num_rows - 1  # one of them asks for nothing
    for row, one in edits.items():
        with np.errstate(over="ignore"):
            penalise(expected.numpy()[row], one.penalties)
    order = torch.tensor([3, 1, 4, 0, 2])
    columns = [torch.tensor(column, dtype=torch.float64)[order] for column in zip(*penalties, strict=True)]
    arguments = (counts, is_in_prompt, order, columns[0].float(), *columns[1:])
    for penalise_rows in (kernels.reference.sampling.penalise, token_scores.penalise):
        found = logits[order].to(device)
        penalise_rows(found, *(x.to(device) for x in arguments))
        assert torch.equal(found.cpu(), expected[order])


def test_log_probabilities_and_ranks(device: torch.device) -> None:
    logits = 4 * torch.randn(5, VOCAB_SIZE)
    logits[1] = 1.0
    logits[2, 10:] = -torch.inf
    tokens = torch.tensor([3, 99, 9, int(logits[3].argmax()), 50])
    logprobs, ranks = token_scores.score_tokens(logits.to(device), tokens.to(device))
    queries = LogprobInputs(np.arange(5), np.zeros(5, dtype=np.int64), tokens.numpy())
    for row, answer in enumerate(read_logprobs(ask_logprobs(logits.numpy(), tokens.numpy(), queries), queries)):
        assert logprobs[row].item() == pytest.approx(answer.logprob, abs=1e-6)
        assert ranks[row].item() == answer.rank
    expected = kernels.reference.sampling.score_tokens(logits, tokens)
    torch.testing.assert_close(logprobs.cpu(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(ranks.cpu(), expected[1])
