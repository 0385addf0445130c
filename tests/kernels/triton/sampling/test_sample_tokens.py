"""Sampling on the device: the tokens of the definition, and those of the engine's sampler on a CPU."""

from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.sampling.host_sampler import HostSampler
from engine.sampling.noise import gumbel, noise_bits, noise_keys, token_words
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.reference.sampling import NO_TOKEN, is_kept, token_noise
from kernels.reference.sampling import sample_tokens as definition
from kernels.triton.sampling import sample_tokens as sampling
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.truncate import NUM_BINS, add_to_histogram, gap_bits, truncate
from tests.support.stepping import sample

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to infinity, as it should
VOCAB_SIZE = 150


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_TOKENS_AT_ONCE", 64)


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def keys_of(num_rows: int) -> Tensor:
    """Of seeds 0, 77, 154, ... at positions 1, 2, 3, ..."""
    row = np.arange(num_rows)
    return torch.from_numpy(noise_keys((row * 77).astype(np.uint64), row + 1).view(np.int32))


def arguments_of(logits: Tensor, rows: list[Row]) -> tuple[Tensor, ...]:
    return (
        logits,
        torch.tensor([row.temperature for row in rows]),
        keys_of(len(rows)),
        -torch.tensor([row.min_p for row in rows], dtype=torch.float64).log().float(),
        torch.tensor([row.top_k or logits.shape[1] for row in rows]),
        torch.tensor([row.top_p for row in rows], dtype=torch.float64),
    )


def engine_s_tokens(logits: Tensor, rows: list[Row]) -> list[int]:
    batch = []
    for i, row in enumerate(rows):
        params = SamplingParams(seed=i * 77, max_tokens=9, **asdict(row))
        token_ids = [0] * (i + 1)
        request = Request(request_id=str(i), prompt_token_ids=token_ids, params=params)
        batch.append(Scheduled(Sequence(request, token_ids, num_computed_tokens=i), 1, 0, samples=True))
    return [result.token_ids[0] for result in sample(HostSampler(logits.shape[1]), logits, batch)]


def check(device: torch.device, logits: Tensor, rows: list[Row]) -> list[int]:
    """Samples on the device, and compares with the definition and the engine. Returns the tokens."""
    arguments = arguments_of(logits, rows)
    random = [row for row in rows if row.temperature]
    known = {"is_random": bool(random), "is_truncated": any(row.top_k or row.top_p < 1.0 for row in random)}
    found = sample_tokens(*(x.to(device) for x in arguments), **known).tolist()
    assert found == definition(*arguments).tolist()
    assert found == engine_s_tokens(logits, rows)
    return found


def test_the_noise_has_the_bits_of_the_engine_s() -> None:
    keys = keys_of(20)
    for key, noise in zip(keys.numpy().view(np.uint32), token_noise(keys, 5000), strict=True):
        assert np.array_equal(noise.numpy(), gumbel(noise_bits(token_words(5000), key)))


def test_untruncated_rows(device: torch.device) -> None:
    tokens = check(device, 3 * torch.randn(4, VOCAB_SIZE), [Row(t) for t in (0.3, 1.0, 5.0, 100.0)])
    assert len(set(tokens)) > 1


@pytest.mark.parametrize(
    "rows",
    [
        [Row(2.0, min_p=0.5), Row(min_p=0.1), Row(1.5, min_p=1e-3)],
        [Row(2.0, top_k=1), Row(top_k=9), Row(1.5, top_k=60)],
        [Row(2.0, top_p=0.1), Row(top_p=0.7), Row(1.5, top_p=0.99)],
        [Row(2.0, 0.3, 60, 0.5), Row(3.0, 0.01, 40, 0.95), Row(1.0, 1e-3, 140, 0.9)],
    ],
    ids=["min_p", "top_k", "top_p", "all"],
)
@pytest.mark.parametrize("max_collected", [8192, 5])
def test_truncated_rows(
    device: torch.device, rows: list[Row], max_collected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether what may be kept fits into the list of it, or whole rows have to be searched."""
    monkeypatch.setattr(sampling, "_MAX_COLLECTED", max_collected)
    check(device, 2 * torch.randn(3, VOCAB_SIZE), rows)


def test_the_first_token_is_sampled_like_any_other(device: torch.device) -> None:
    """Where a list is filled up with its id."""
    logits = torch.randn(6, VOCAB_SIZE)
    logits[:, 0] += 3.0
    assert 0 in check(device, logits, [Row(1.0, top_k=5)] * 5 + [Row(2.0, top_p=0.5)])


def test_rows_are_cut_far_below_their_best_token_too(device: torch.device) -> None:
    """Where the histogram has a single bin for all that lies there."""
    logits = torch.cat((torch.zeros(3, 1), torch.full((3, VOCAB_SIZE - 1), -17.0)), dim=1)
    logits[:, 1:] -= torch.rand(3, VOCAB_SIZE - 1)
    check(device, logits, [Row(top_p=0.9999999), Row(top_k=30), Row(0.9, top_k=90, top_p=0.9999995)])


def test_of_equal_logits_the_lowest_ids_are_kept(device: torch.device) -> None:
    logits = torch.randint(0, 3, (4, VOCAB_SIZE)).float()
    check(device, logits, [Row(top_k=7), Row(top_p=0.2), Row(9.0, top_k=70, top_p=0.6), Row(1.0, 0.4, 70, 0.9)])


def test_rows_of_each_kind_beside_each_other(device: torch.device) -> None:
    logits = 2 * torch.randn(5, VOCAB_SIZE)
    check(device, logits, [Row(0.0), Row(), Row(top_k=5), Row(0.0, top_p=0.5), Row(top_p=0.5)])
    check(device, logits, [Row(0.0), Row(), Row(0.0, top_k=5), Row(2.0), Row(0.5, min_p=0.2)])
    check(device, logits, [Row(0.0), Row(0.0, top_p=0.5), Row(0.0), Row(0.0), Row(0.0)])


def test_hidden_tokens_are_never_sampled(device: torch.device) -> None:
    logits = torch.full((2, VOCAB_SIZE), -torch.inf)
    logits[:, 70:73] = torch.randn(2, 3)
    tokens = check(device, logits, [Row(50.0), Row(50.0, top_k=100, top_p=0.999)])
    assert set(tokens) <= {70, 71, 72}


def test_greedy_rows_and_unusable_rows(device: torch.device) -> None:
    logits = torch.randn(5, VOCAB_SIZE)
    logits[0, [140, 60]] = 9.0  # the lowest id among equals
    logits[2, 3] = torch.nan
    logits[3, 3] = torch.inf
    logits[4] = -torch.inf
    arguments = arguments_of(logits, [Row(0.0), Row(0.0), Row(), Row(), Row()])
    found = sample_tokens(*(x.to(device) for x in arguments)).tolist()
    assert found == [60, int(logits[1].argmax()), NO_TOKEN, NO_TOKEN, NO_TOKEN]
    assert found == definition(*arguments).tolist()


@triton.jit
def truncate_kernel(
    logits_ptr, peaks_ptr, max_gaps_ptr, top_ks_ptr, top_ps_ptr, cuts_ptr, counts_ptr, weights_ptr, vocab_size
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row * vocab_size
    counts_row, weights_row = counts_ptr + row * NUM_BINS, weights_ptr + row * NUM_BINS
    tokens = tl.arange(0, 64)
    is_token = tokens < vocab_size
    gaps = tl.load(peaks_ptr + row) - tl.load(row_ptr + tokens, mask=is_token, other=float("-inf"))
    is_left = is_token & (gap_bits(gaps) <= gap_bits(tl.load(max_gaps_ptr + row)))
    top_p = tl.load(top_ps_ptr + row)
    add_to_histogram(counts_row, weights_row, gaps, is_left, top_p < 1.0)
    cut, last_level = truncate(
        row_ptr,
        counts_row,  # no list of tokens
        False,
        vocab_size,
        vocab_size,
        tl.load(peaks_ptr + row),
        1.0,
        tl.load(max_gaps_ptr + row),
        tl.load(top_ks_ptr + row),
        top_p,
        counts_row,
        weights_row,
        32,
    )
    tl.store(cuts_ptr + 2 * row, cut)
    tl.store(cuts_ptr + 2 * row + 1, last_level)


def test_the_cut_keeps_the_tokens_that_sorting_keeps(device: torch.device) -> None:
    """Few levels, so that most cuts go through one; every pair of limits."""
    num_rows, vocab_size = 16, 37
    logits = torch.randint(0, 6, (num_rows, vocab_size)) * torch.tensor([0.01, 0.4, 1.0, 3.0]).repeat(4)[:, None]
    max_gaps = torch.where(torch.rand(num_rows) < 0.5, torch.rand(num_rows) * 4, torch.inf)
    top_ks = torch.where(torch.rand(num_rows) < 0.7, torch.randint(1, vocab_size, (num_rows,)), vocab_size)
    top_ps = torch.where(torch.rand(num_rows) < 0.7, torch.rand(num_rows, dtype=torch.float64), 1.0)
    cuts = torch.empty(num_rows, 2, dtype=torch.int32, device=device)
    arguments = (logits, logits.amax(-1), max_gaps, top_ks, top_ps)
    counts, weights = (torch.zeros(num_rows, NUM_BINS.value, dtype=dtype) for dtype in (torch.int32, torch.int64))
    others = (cuts, counts.to(device), weights.to(device), vocab_size)
    truncate_kernel[(num_rows,)](*(x.to(device) for x in arguments), *others)
    gaps = logits.amax(-1, keepdim=True) - logits
    cut, last_level = cuts.cpu().split(1, dim=1)
    bits = (gaps + 0.0).view(torch.int32)
    found = (bits < cut) | ((bits == cut) & (torch.arange(vocab_size) <= last_level))
    assert torch.equal(found, is_kept(gaps, max_gaps, top_ks, top_ps))
