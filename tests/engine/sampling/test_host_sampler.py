"""The sampler against its definition, one row at a time in plain Python, and against itself in other company."""

import math
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from engine.sampling.host_sampler import HostSampler
from engine.sampling.noise import gumbel, noise_bits, noise_keys, token_words
from engine.sampling.triton_sampler import TritonSampler
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence

INF = math.inf


def make_item(
    params: SamplingParams,
    *,
    prompt: list[int],
    output: list[int] = (),
    drafts: list[int] = (),
    parents: list[int] | None = None,
) -> Scheduled:
    request = Request(request_id="r", prompt_token_ids=list(prompt), params=params)
    seq = Sequence(request, [*prompt, *output])
    seq.draft_token_ids = list(drafts)
    seq.draft_parents = list(range(-1, len(drafts) - 1)) if parents is None else list(parents)
    seq.num_computed_tokens = seq.num_tokens - 1
    return Scheduled(seq, 1 + len(drafts), len(drafts), samples=True)


def make_params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 100, **fields})


# --- the definition ---


def edited(logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams) -> np.ndarray:
    """What the request's penalties, bias and bans make of one row."""
    row = logits.astype(np.float32).copy()
    penalty = np.float32(params.repetition_penalty)
    for token in set(prompt + output):
        if params.repetition_penalty != 1.0:
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(output):
        row[token] -= np.float32(params.frequency_penalty * output.count(token) + params.presence_penalty)
    for token, bias in params.logit_bias.items():
        row[token] += np.float32(bias)
    banned = set()
    if params.allowed_token_ids is not None:
        banned |= set(range(len(row))) - set(params.allowed_token_ids)
    if len(output) < params.min_tokens:
        banned |= set(params.stop_token_ids)
    for *start, last in params.bad_words:
        context = prompt + output
        if len(context) >= len(start) and context[len(context) - len(start) :] == start:
            banned.add(last)
    row[[token for token in banned if token < len(row)]] = -INF
    return row


def kept_gaps(row: np.ndarray, params: SamplingParams) -> dict[int, np.float32]:
    """The gap of every token that min-p, top-k and top-p leave, in that order."""
    gaps = (row.max() - row) / np.float32(params.temperature)
    order = sorted((token for token in range(len(row)) if gaps[token] < INF), key=lambda token: (gaps[token], token))
    if params.min_p > 0:
        order = [token for token in order if gaps[token] <= np.float32(-math.log(params.min_p))]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        weights = [round(math.exp(-float(gaps[token])) * 2**40) for token in order]
        limit = float(sum(weights)) * params.top_p
        order = [token for i, token in enumerate(order) if i == 0 or sum(weights[:i]) < limit]
    return {token: gaps[token] for token in order}


def all_noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    (key,) = noise_keys(np.array([seed % 2**64], dtype=np.uint64), np.array([position]))
    return gumbel(noise_bits(token_words(vocab_size), key))


def chosen(logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams) -> int:
    """The token that one row must give."""
    row = edited(logits, prompt, output, params)
    if params.temperature == 0:
        return int(row.argmax())
    noise = all_noise(params.seed, len(prompt) + len(output), len(row))
    scores = {token: noise[token] - gap for token, gap in kept_gaps(row, params).items()}
    return min(scores, key=lambda token: (-scores[token], token))


def walk(item: Scheduled, logits: np.ndarray) -> Sampled:
    """The definition of verification, by recursion over the tree."""
    seq = item.seq
    output = seq.token_ids[seq.num_prompt_tokens :]

    def descend(node: int, path: list[int]) -> tuple[list[int], list[int]]:
        token = chosen(logits[node + 1], seq.request.prompt_token_ids, output + path, seq.params)
        for child in range(item.num_drafts):
            if seq.draft_parents[child] == node and seq.draft_token_ids[child] == token:
                tokens, accepted = descend(child, [*path, token])
                return [token, *tokens], [child, *accepted]
        return [token], []

    return Sampled(*descend(-1, []))


# --- random cases ---


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    def maybe(probability: float, value: object, otherwise: object) -> object:
        return value if rng.random() < probability else otherwise

    def tokens(most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(1, most))]

    return SamplingParams(
        seed=rng.choice([0, -1, 2**63 - 1, rng.getrandbits(62)]),
        max_tokens=100,
        temperature=rng.choice([0.0, 1e-4, 0.5, 1.0, 2.0]),
        top_p=maybe(0.5, rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999999]), 1.0),
        top_k=maybe(0.5, rng.choice([-1, 1, 2, vocab_size // 2, vocab_size, 10 * vocab_size]), 0),
        min_p=maybe(0.3, rng.choice([1e-6, 0.05, 0.5, 1.0]), 0.0),
        frequency_penalty=maybe(0.3, rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(0.3, rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(0.3, rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe(0.3, {token: rng.choice([-100.0, 100.0, 1.5]) for token in tokens(3)}, {}),
        allowed_token_ids=maybe(0.2, tokens(vocab_size), None),
        bad_words=maybe(0.3, [tokens(3) for _ in range(5)], []),
        stop_token_ids=maybe(0.5, tokens(3), []),
        min_tokens=maybe(0.5, rng.randint(0, 6), 0),
    )


def random_logits(rng: random.Random, num_rows: int, vocab_size: int) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size) * rng.choice([0.1, 1.0, 5.0, 30.0])
    logits[:, : rng.choice([0, 3, 6])] += 4 * logits.std()  # where the drafts are
    if rng.random() < 0.3:
        logits = logits.bfloat16().float()  # many equal values
    if rng.random() < 0.2:
        logits = logits.round()
    if rng.random() < 0.2:
        logits[torch.rand_like(logits) < 0.5] = -INF
        logits[:, rng.randrange(vocab_size)] = 1.0
    return logits


def random_item(rng: random.Random, vocab_size: int, *, params: SamplingParams | None = None) -> Scheduled:
    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(min(vocab_size, 6)) for _ in range(rng.randint(least, most))]

    drafts = tokens(0, 5)
    is_tree = rng.random() < 0.5
    parents = [rng.randrange(-1, i) if is_tree else i - 1 for i in range(len(drafts))]
    params = params or random_params(rng, vocab_size)
    return make_item(params, prompt=tokens(1, 8), output=tokens(0, 6), drafts=drafts, parents=parents)


def can_sample(item: Scheduled, logits: torch.Tensor) -> bool:
    """Whether every row has some token left: the other case has its own tests."""
    output = item.seq.token_ids[item.seq.num_prompt_tokens :]
    paths = [[]]
    for token, parent in zip(item.seq.draft_token_ids, item.seq.draft_parents, strict=True):
        paths.append([*paths[parent + 1], token])
    rows = zip(logits.numpy(), paths, strict=True)
    prompt = item.seq.request.prompt_token_ids
    return all(edited(row, prompt, output + path, item.seq.params).max() > -INF for row, path in rows)


def random_case(rng: random.Random, vocab_size: int) -> tuple[Scheduled, torch.Tensor]:
    while True:
        item = random_item(rng, vocab_size)
        logits = random_logits(rng, item.num_logits, vocab_size)
        if can_sample(item, logits):
            return item, logits


@pytest.mark.parametrize("vocab_size", [5, 64, 65, 300])
def test_every_combination_of_parameters_follows_the_definition(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    torch.manual_seed(vocab_size)
    sampler = HostSampler(vocab_size)
    num_accepted = 0
    for _ in range(12):
        items, logits = zip(*(random_case(rng, vocab_size) for _ in range(10)), strict=True)
        results = sampler(torch.cat(logits), list(items))
        for item, rows, result in zip(items, logits, results, strict=True):
            assert result == walk(item, rows.numpy()), item.seq.params
            num_accepted += len(result.accepted)
    assert num_accepted > 10


def test_sampled_tokens_are_the_same_alone_and_in_any_batch() -> None:
    rng = random.Random(3)
    torch.manual_seed(3)
    vocab_size = 3001
    sampler = HostSampler(vocab_size)
    cases = [random_case(rng, vocab_size) for _ in range(40)]
    alone = [sampler(logits, [item])[0] for item, logits in cases]
    for _ in range(10):
        chosen_cases = rng.sample(range(len(cases)), rng.randint(2, len(cases)))
        items, logits = [cases[i][0] for i in chosen_cases], [cases[i][1] for i in chosen_cases]
        assert sampler(torch.cat(logits), items) == [alone[i] for i in chosen_cases]


def test_drafts_change_how_many_tokens_come_and_never_which() -> None:
    """A toy model whose logits depend on the whole context, decoded plainly and through random trees of drafts."""
    rng = random.Random(5)
    vocab_size = 6
    sampler = HostSampler(vocab_size)

    def model(context: list[int]) -> torch.Tensor:
        return torch.tensor([random.Random(f"{context} {token}").gauss(0, 2) for token in range(vocab_size)])

    def decode(params: SamplingParams, *, with_drafts: bool) -> tuple[list[int], int]:
        output, num_steps = [], 0
        while len(output) < 30:
            num_drafts = rng.randint(0, 8) if with_drafts else 0
            drafts = [rng.randrange(vocab_size) for _ in range(num_drafts)]
            parents = [rng.randrange(-1, i) for i in range(num_drafts)]
            item = make_item(params, prompt=[1, 2, 3], output=output, drafts=drafts, parents=parents)
            paths = [[]]
            for draft, parent in zip(drafts, parents, strict=True):
                paths.append([*paths[parent + 1], draft])
            logits = torch.stack([model(item.seq.token_ids + path) for path in paths])
            output, num_steps = output + sampler(logits, [item])[0].token_ids, num_steps + 1
        return output[:30], num_steps

    for seed in range(8):
        params = make_params(
            seed=seed,
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_p=rng.choice([0.8, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            bad_words=rng.choice([[], [[1, 2], [3]]]),
            stop_token_ids=[4],
            min_tokens=rng.choice([0, 12]),
        )
        plain, num_plain_steps = decode(params, with_drafts=False)
        drafted, num_drafted_steps = decode(params, with_drafts=True)
        assert drafted == plain
        assert num_drafted_steps < num_plain_steps == 30


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_large_vocabularies_follow_the_definition_too(scale: float) -> None:
    """Lists, blocks and sorted nuclei only differ from the whole row where the vocabulary is large."""
    torch.manual_seed(int(scale))
    vocab_size = 20_011
    logits = (torch.randn(6, vocab_size) * scale).bfloat16().float()
    settings = [
        make_params(temperature=1.0, seed=1),
        make_params(top_k=300, seed=2),
        make_params(top_k=1500, top_p=0.9, seed=3),
        make_params(top_p=0.6, seed=4),
        make_params(top_p=0.999, min_p=0.001, seed=5),
        make_params(min_p=0.2, top_k=40, top_p=0.5, seed=6),
    ]
    sampler = HostSampler(vocab_size)
    for repeat in range(4):
        items = [make_item(msgspec.structs.replace(p, seed=p.seed + 100 * repeat), prompt=[7]) for p in settings]
        for item, row, result in zip(items, logits, sampler(logits, items), strict=True):
            assert result.token_ids == [chosen_fast(row.numpy(), item)]


def chosen_fast(logits: np.ndarray, item: Scheduled) -> int:
    """The definition again, with numpy's sort and exact integer sums instead of lists."""
    params = item.seq.params
    gaps = (logits.max() - logits) / np.float32(params.temperature)
    order = np.lexsort((np.arange(len(gaps)), gaps))
    if params.min_p > 0:
        order = order[gaps[order] <= np.float32(-math.log(params.min_p))]
    order = order[: params.top_k or len(order)]
    weights = np.rint(np.exp(-gaps[order].astype(np.float64)) * 2.0**40).astype(np.int64)
    before = np.cumsum(weights) - weights
    if params.top_p < 1:
        order = order[before < float(weights.sum()) * params.top_p]
    scores = all_noise(params.seed, item.seq.num_tokens, len(logits))[order] - gaps[order]
    return int(order[scores == scores.max()].min())


def test_the_logits_stay_as_they_are() -> None:
    rng = random.Random(9)
    cases = [random_case(rng, 50) for _ in range(10)]
    logits = torch.cat([rows for _, rows in cases])
    before = logits.clone()
    HostSampler(50)(logits, [item for item, _ in cases])
    assert torch.equal(logits, before)


def test_chunks_that_do_not_sample_get_nothing_and_disturb_nobody() -> None:
    torch.manual_seed(1)
    item = make_item(make_params(seed=3), prompt=[1, 2])
    chunk = replace(make_item(make_params(), prompt=[1, 2, 3]), samples=False)
    logits = torch.randn(1, 30)
    sampler = HostSampler(30)
    alone = sampler(logits, [item])[0]
    assert sampler(logits, [chunk, item, chunk]) == [Sampled([]), alone, Sampled([])]
    assert sampler(logits[:0], [chunk]) == [Sampled([])]


def test_a_top_k_of_many_tokens_keeps_the_same_ones_without_sorting_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    torch.manual_seed(6)
    for _ in range(400):
        vocab_size = rng.choice([2, 7, 60, 300])
        fields = {
            "top_k": rng.randrange(1, vocab_size + 2),
            "top_p": rng.choice([1.0, 0.9, 0.5, 1e-9]),
            "min_p": rng.choice([0.0, 0.0, 0.1]),
            "temperature": rng.choice([0.3, 1.0, 2.0]),
        }
        items = [make_item(make_params(**fields, seed=rng.getrandbits(40)), prompt=[1]) for _ in range(4)]
        logits = random_logits(rng, 4, vocab_size)
        listed = HostSampler(vocab_size)(logits, items)
        with monkeypatch.context() as patch:
            patch.setattr("engine.sampling.host_sampler.FEW_TOKENS", 0)
            assert HostSampler(vocab_size)(logits, items) == listed


# --- what a client has named is read once ---


@pytest.mark.parametrize("make_sampler", [HostSampler, TritonSampler])
def test_lists_of_a_request_are_read_for_its_first_token_only(make_sampler) -> None:
    """What a step costs everybody else does not depend on how much one client has named."""
    rng = random.Random(5)
    torch.manual_seed(5)
    for _ in range(20):
        logits = torch.randn(4, 50)
        fields = {
            "allowed_token_ids": rng.sample(range(50), 30),
            "logit_bias": dict.fromkeys(rng.sample(range(50), 20), 3.0),
            "bad_words": [[rng.randrange(50)] for _ in range(3)] + [[2, rng.randrange(50)] for _ in range(20)],
            "stop_token_ids": rng.sample(range(50), 10),
            "min_tokens": 9,
        }
        item = make_item(make_params(**fields, seed=rng.getrandbits(40)), prompt=[1, 2], drafts=[2, 2, 2])
        sampler = make_sampler(50)
        expected = sampler(logits, [item])
        for named in ("allowed_token_ids", "logit_bias", "bad_words", "stop_token_ids"):
            getattr(item.seq.params, named).clear()
        assert sampler(logits, [item]) == expected


# --- what cannot be sampled ---

NOWHERE = {"allowed_token_ids": [3], "logit_bias": {3: 100.0}, "bad_words": [[3]]}


@pytest.mark.parametrize("bad_row", [[math.nan] * 8, [0.0] * 7 + [math.nan], [0.0] * 7 + [INF], [-INF] * 8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_logits_that_are_not_finite_fail_their_request_alone(bad_row, temperature: float, top_p: float) -> None:
    torch.manual_seed(2)
    params = make_params(temperature=temperature, top_p=top_p, logprobs=1)
    items = [make_item(params, prompt=[1], output=[2] * i) for i in range(3)]
    logits = torch.randn(3, 8)
    sampler = HostSampler(8)
    healthy = sampler(logits, items)
    logits[1] = torch.tensor(bad_row)
    results = sampler(logits, items)
    assert results[1].token_ids == []
    assert "not finite" in results[1].error
    assert "position 2" in results[1].error
    assert [r.token_ids for r in (results[0], results[2])] == [r.token_ids for r in (healthy[0], healthy[2])]
    assert results[0].error is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banning_every_token_fails_the_request_alone(temperature: float) -> None:
    params = make_params(temperature=temperature, top_k=2)
    items = [make_item(msgspec.structs.replace(params, **NOWHERE), prompt=[1]), make_item(params, prompt=[1])]
    results = HostSampler(8)(torch.zeros(2, 8), items)
    assert "no token is allowed" in results[0].error
    assert results[0].error_kind == "constraints"
    assert results[0].token_ids == []
    assert results[1].error is None
    assert len(results[1].token_ids) == 1


def test_a_bad_row_behind_drafts_counts_only_when_decoding_gets_there() -> None:
    logits = torch.zeros(3, 8)
    logits[0, 5] = logits[1, 6] = 9.0
    sampler = HostSampler(8)
    item = make_item(make_params(temperature=0.0), prompt=[1], drafts=[5, 6])
    assert sampler(logits, [item])[0] == Sampled([5, 6, 0], [0, 1])
    logits[2] = math.nan
    assert sampler(logits, [item])[0] == Sampled([5, 6], [0])  # the next step meets it at the root
    other = make_item(make_params(temperature=0.0), prompt=[1], drafts=[4, 6])
    assert sampler(logits, [other])[0] == Sampled([5])


# --- extremes ---


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-5},
        {"temperature": 1e-30},
        {"top_p": 1e-30},
        {"top_k": 1},
        {"min_p": 1.0},
        {"logit_bias": {3: 100.0}},
        {"allowed_token_ids": [3]},
        {"allowed_token_ids": [3, 3], "top_p": 0.1},
        {"logit_bias": dict.fromkeys((0, 1, 2, 4, 5, 6, 7, 8, 9), -100.0)},
        {"bad_words": [[token] for token in range(10) if token != 3]},
        {"repetition_penalty": 1e-40},
    ],
)
def test_extreme_settings_leave_one_token(fields: dict[str, object]) -> None:
    logits = torch.linspace(0.1, 1.0, 10).repeat(20, 1)
    logits[:, 3] = 2.0
    items = [make_item(make_params(seed=seed, **fields), prompt=[3]) for seed in range(20)]
    assert [result.token_ids for result in HostSampler(10)(logits, items)] == [[3]] * 20


def test_one_possible_token_is_sampled_whatever_the_filters() -> None:
    logits = torch.full((4, 5000), -INF)
    logits[:, 4321] = -7.0
    fields = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 2000, "min_p": 0.1}]
    items = [make_item(make_params(**some), prompt=[1]) for some in fields]
    assert [result.token_ids for result in HostSampler(5000)(logits, items)] == [[4321]] * 4
