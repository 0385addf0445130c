"""Arrivals, lengths and prompts."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from loadtest.client.client import Api, Target
from loadtest.compare.measure import calibrate
from loadtest.workload.arrivals import poisson_times
from loadtest.workload.lengths import FixedLength, LogNormalLength, UniformLength, parse_length
from loadtest.workload.prompts import PromptText, Workload
from tests.support.scripted_server import DONE, Reply, event


def gaps_of(rate: float, seed: int, count: int) -> np.ndarray:
    return np.diff([0.0, *islice(poisson_times(rate, seed), count)])


@pytest.mark.parametrize("seed", range(5))
def test_gaps_between_arrivals_are_exponential(seed: int) -> None:
    """Kolmogorov-Smirnov: the largest distance of the distributions stays under the bound for 0.1 percent."""
    count, rate = 20_000, 40.0
    gaps = np.sort(gaps_of(rate, seed, count))
    expected = 1 - np.exp(-rate * gaps)
    observed = np.arange(1, count + 1) / count
    assert np.abs(observed - expected).max() < 1.95 / np.sqrt(count)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)


def test_counts_in_windows_scatter_like_a_poisson_process() -> None:
    """Variance equals mean, and one window says nothing about the next."""
    times = np.cumsum(gaps_of(50.0, 11, 100_000))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(50, rel=0.02)
    assert counts.var() == pytest.approx(50, rel=0.1)
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 0.08


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert list(islice(poisson_times(3.0, 5), 600)) == list(islice(poisson_times(3.0, 5), 600))
    assert list(islice(poisson_times(3.0, 5), 3)) != list(islice(poisson_times(3.0, 6), 3))


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("128", FixedLength(128)),
        ("fixed:7", FixedLength(7)),
        ("uniform:3:9", UniformLength(3, 9)),
        ("lognormal:100:0.5", LogNormalLength(100, 0.5, 800)),
        ("lognormal:100:0.5:200", LogNormalLength(100, 0.5, 200)),
    ],
)
def test_lengths_are_read_as_they_are_written(text: str, length: object) -> None:
    assert parse_length(text) == length
    assert parse_length(str(length)) == length


@pytest.mark.parametrize("text", ["", "0", "-3", "x", "uniform:5", "uniform:9:3", "uniform:0:3", "normal:3:4", "1.5"])
def test_a_length_that_is_none_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        parse_length(text)


def test_drawn_lengths_have_their_distribution() -> None:
    random = np.random.default_rng(1)
    uniform = [UniformLength(3, 6).draw(random) for _ in range(8000)]
    assert np.bincount(uniform)[3:] == pytest.approx([2000] * 4, rel=0.1)
    heavy = np.array([LogNormalLength(100, 0.7, 1000).draw(random) for _ in range(8000)])
    assert np.median(heavy) == pytest.approx(100, rel=0.05)
    assert np.log(heavy).std() == pytest.approx(0.7, rel=0.05)
    assert (heavy.min() >= 1, heavy.max() <= 1000) == (True, True)


def test_prompts_have_exactly_their_length_and_differ() -> None:
    workload = Workload(UniformLength(1, 50), UniformLength(2, 4), seed=1, token_ids=(10, 99))
    exchanges = [workload.exchange(i) for i in range(300)]
    assert {len(e.prompt) for e in exchanges} == set(range(1, 51))
    assert {e.num_output_tokens for e in exchanges} == {2, 3, 4}
    assert all(10 <= token <= 99 for e in exchanges for token in e.prompt)
    long = [tuple(e.prompt) for e in exchanges if len(e.prompt) > 8]
    assert len(set(long)) == len(long)
    assert exchanges[7] == workload.exchange(7)


def test_streams_and_seeds_give_other_prompts() -> None:
    length = FixedLength(32)
    prompts = {tuple(Workload(length, length, seed=s, stream=t).exchange(0).prompt) for s in range(5) for t in range(5)}
    assert len(prompts) == 25


def test_the_shared_part_of_prompts_is_shared_by_the_fraction_asked_for() -> None:
    workload = Workload(FixedLength(64), FixedLength(1), seed=2, num_shared_tokens=48, shared_fraction=0.7)
    prompts = [workload.exchange(i).prompt for i in range(1000)]
    ((_, num_shared),) = Counter(tuple(prompt[:48]) for prompt in prompts).most_common(1)
    assert num_shared == pytest.approx(700, abs=60)
    assert len({tuple(p[48:]) for p in prompts}) == 1000
    assert all(len(p) == 64 for p in prompts)


def test_a_shared_prefix_leaves_every_prompt_a_token_of_its_own() -> None:
    workload = Workload(FixedLength(8), FixedLength(1), seed=2, num_shared_tokens=100)
    assert len({tuple(workload.exchange(i).prompt) for i in range(20)}) > 15
    assert {len(workload.exchange(i).prompt) for i in range(20)} == {8}


async def test_words_are_calibrated_by_what_the_server_counts(serve) -> None:
    """A server whose template has 9 tokens and whose words have two tokens each."""

    def count(text: str) -> int:
        return 9 + 2 * len(text.split())

    def reply(_: int, served) -> object:
        num_tokens, done = served.body["max_tokens"], DONE
        end = event(finish_reason="length", chat=True)
        usage = event(usage=(count(served.body["messages"][0]["content"]), num_tokens))
        return Reply(((0.0, event("a", chat=True)), (0.0, end), (0.0, usage), (0.0, done)))

    server = serve(reply)
    text = await calibrate(Target(server.url, model="m", api=Api.CHAT), seed=1)
    assert text == PromptText(9, 2)
    workload = Workload(FixedLength(129), FixedLength(4), seed=1, num_shared_tokens=20, text=text)
    prompts = [workload.exchange(i).prompt for i in range(20)]
    assert {count(prompt) for prompt in prompts} == {129}
    assert len(set(prompts)) == 20


def test_a_prompt_shorter_than_the_template_is_refused() -> None:
    with pytest.raises(ValueError, match="longer prompts"):
        PromptText(30, 1).num_words(30)
