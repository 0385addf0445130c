"""Steps of requests that ask for anything, and the definition of sampling, one row at a time in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Listing

import numpy as np
import torch
from torch import Tensor

from engine.sampling.noise import gumbel, noise_bits, noise_keys, token_words
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence, TokenLogprobs

INF = math.inf


def make_item(
    params: SamplingParams,
    *,
    prompt: list[int],
    output: Listing[int] = (),
    drafts: Listing[int] = (),
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


def random_logits(rng: random.Random, num_rows: int, vocab_size: int) -> Tensor:
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


def can_sample(item: Scheduled, logits: Tensor) -> bool:
    """Whether every row has some token left: the other case has its own tests."""
    output = item.seq.token_ids[item.seq.num_prompt_tokens :]
    paths = [[]]
    for token, parent in zip(item.seq.draft_token_ids, item.seq.draft_parents, strict=True):
        paths.append([*paths[parent + 1], token])
    rows = zip(logits.numpy(), paths, strict=True)
    prompt = item.seq.request.prompt_token_ids
    return all(edited(row, prompt, output + path, item.seq.params).max() > -INF for row, path in rows)


def random_case(rng: random.Random, vocab_size: int) -> tuple[Scheduled, Tensor]:
    while True:
        item = random_item(rng, vocab_size)
        logits = random_logits(rng, item.num_logits, vocab_size)
        if can_sample(item, logits):
            return item, logits


def random_masks(rng: random.Random, num_rows: int, vocab_size: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Rows of a step that follow a grammar, what it allows in each, bool, and the same as packed words."""
    rows = sorted(rng.sample(range(num_rows), rng.randint(0, num_rows)))
    allowed = np.random.default_rng(rng.getrandbits(32)).random((len(rows), vocab_size)) < rng.choice([0.05, 0.5, 0.95])
    padded = np.ones((len(rows), -(-vocab_size // 32) * 32 + 32), dtype=bool)  # tokens that the model does not have
    padded[:, :vocab_size] = allowed
    return rows, allowed, np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


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


# --- log-probabilities ---


def expected_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """By torch's log_softmax over one row of untouched logits; equal values in the order of their ids."""
    logprobs = logits.log_softmax(-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda token: (-logits[token].item(), token))
    top = [token for token in order[:num_top] if logprobs[token] > -math.inf]
    rank = 1 + sum(value > logits[token_id].item() for value in logits.tolist())
    return TokenLogprobs(token_id, logprobs[token_id], rank, top, [logprobs[token] for token in top])
