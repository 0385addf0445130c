"""The laws of a sampler (`engine.sampling.sampler.TokenSampler`)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Listing
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.grammar_masks import GrammarMasks
from engine.runner.step_builder import StepBuilder
from engine.sampling.sampler import TokenSampler
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence, TokenLogprobs
from tests.support import stepping
from tests.support.sampling_cases import (
    INF,
    can_sample,
    chosen_fast,
    expected_logprobs,
    make_item,
    make_params,
    random_case,
    random_masks,
    random_params,
    walk,
)


def _decoding(penalty: float) -> list[Scheduled]:
    """Four sequences that decode a token each; half of all pairs of tokens are words that must not come."""
    words = [[a, b] for a in range(0, 30, 2) for b in range(30)] + [[7]]
    items = [
        make_item(
            make_params(seed=seed, temperature=seed / 2, bad_words=words, frequency_penalty=penalty),
            prompt=[1] * (2 + seed),
        )
        for seed in range(4)
    ]
    for item in items:
        item.seq.block_tables = [[1, 2]]
    return items


NOWHERE = {"allowed_token_ids": [3], "logit_bias": {3: 100.0}, "bad_words": [[3]]}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to infinity, as it should
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # where logits are no numbers
class SamplerConformance:
    """Tokens are those of the definition, to the bit of their choice; log-probabilities within float32's rounding."""

    num_random_batches = 12  # of each vocabulary's size
    many_tokens = 20_011  # a vocabulary in which short cuts pay

    @pytest.fixture(autouse=True)
    def _reproducible(self, one_thread_and_seed: None) -> None:
        """Every test begins with the same seed."""

    def make(self, vocab_size: int) -> TokenSampler:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return torch.device("cpu")

    def sample(self, sampler: TokenSampler, logits: Tensor, batch: Listing[Scheduled]) -> list[Sampled]:
        return stepping.sample(sampler, logits.to(self.device), list(batch))

    # --- it is the definition ---

    @pytest.mark.parametrize("vocab_size", [5, 64, 65, 300])
    def test_every_combination_of_parameters_follows_the_definition(self, vocab_size: int) -> None:
        rng = random.Random(vocab_size)
        sampler = self.make(vocab_size)
        num_accepted = 0
        for _ in range(self.num_random_batches):
            items, logits = zip(*(random_case(rng, vocab_size) for _ in range(10)), strict=True)
            results = self.sample(sampler, torch.cat(logits), items)
            for item, rows, result in zip(items, logits, results, strict=True):
                assert result == walk(item, rows.numpy()), item.seq.params
                num_accepted += len(result.accepted)
        assert num_accepted > 10

    @pytest.mark.parametrize("vocab_size", [5, 64, 65, 300])
    def test_a_masked_token_is_as_impossible_as_one_that_the_model_never_says(self, vocab_size: int) -> None:
        """At every verified position, beside rows without a mask, with whatever else a request asks for."""
        rng = random.Random(vocab_size)
        sampler = self.make(vocab_size)
        num_accepted = num_masked = 0
        for _ in range(self.num_random_batches):
            items, logits = zip(*(random_case(rng, vocab_size) for _ in range(10)), strict=True)
            whole = torch.cat(logits)
            rows, allowed, words = random_masks(rng, len(whole), vocab_size)
            masked = whole.clone()
            masked[rows] = masked[rows].masked_fill(~torch.from_numpy(allowed), -INF)
            parts = masked.split([len(one) for one in logits])
            if not all(can_sample(item, part) for item, part in zip(items, parts, strict=True)):
                continue
            masks = GrammarMasks(np.array(rows, dtype=np.int64), words) if rows else None
            before = whole.clone()
            results = stepping.sample(sampler, whole.to(self.device), list(items), masks=masks)
            assert torch.equal(whole, before)
            for item, part, result in zip(items, parts, results, strict=True):
                assert result == walk(item, part.numpy()), item.seq.params
                num_accepted += len(result.accepted)
            num_masked += len(rows)
        assert num_masked > 20 or vocab_size < 64
        assert num_accepted > 0 or vocab_size < 64

    def test_a_mask_that_leaves_nothing_is_no_error_of_the_model_s_and_none_hides_one(self) -> None:
        logits = torch.randn(4, 70)
        logits[1, 5] = math.nan
        logits[2] = -INF
        words = np.zeros((4, 3), dtype=np.uint32)
        words[3, 1] = 1 << 3
        masks = GrammarMasks(np.arange(4), words)
        for temperature in (0.0, 1.0):
            items = [make_item(make_params(temperature=temperature), prompt=[1]) for _ in range(4)]
            results = stepping.sample(self.make(70), logits.to(self.device), items, masks=masks)
            kinds = [result.error_kind for result in results[:3]]
            assert kinds == ["constraints", "request", "request"]
            assert "no token is allowed" in str(results[0].error)
            assert results[3].token_ids == [35]

    @pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
    def test_large_vocabularies_follow_the_definition_too(self, scale: float) -> None:
        logits = (torch.randn(6, self.many_tokens) * scale).bfloat16().float()
        settings = [
            make_params(temperature=1.0, seed=1),
            make_params(top_k=300, seed=2),
            make_params(top_k=1500, top_p=0.9, seed=3),
            make_params(top_p=0.6, seed=4),
            make_params(top_p=0.999, min_p=0.001, seed=5),
            make_params(min_p=0.2, top_k=40, top_p=0.5, seed=6),
        ]
        sampler = self.make(self.many_tokens)
        for repeat in range(4):
            items = [make_item(msgspec.structs.replace(p, seed=p.seed + 100 * repeat), prompt=[7]) for p in settings]
            for item, row, result in zip(items, logits, self.sample(sampler, logits, items), strict=True):
                assert result.token_ids == [chosen_fast(row.numpy(), item)]

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
    def test_extreme_settings_leave_one_token(self, fields: dict[str, object]) -> None:
        logits = torch.linspace(0.1, 1.0, 10).repeat(20, 1)
        logits[:, 3] = 2.0
        items = [make_item(make_params(seed=seed, **fields), prompt=[3]) for seed in range(20)]
        assert [result.token_ids for result in self.sample(self.make(10), logits, items)] == [[3]] * 20

    def test_one_possible_token_is_sampled_whatever_the_filters(self) -> None:
        logits = torch.full((4, 5000), -INF)
        logits[:, 4321] = -7.0
        fields = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 2000, "min_p": 0.1}]
        items = [make_item(make_params(**some), prompt=[1]) for some in fields]
        assert [result.token_ids for result in self.sample(self.make(5000), logits, items)] == [[4321]] * 4

    def test_the_logits_stay_as_they_are(self) -> None:
        rng = random.Random(9)
        cases = [random_case(rng, 50) for _ in range(10)]
        logits = torch.cat([rows for _, rows in cases]).to(self.device)
        before = logits.clone()
        self.sample(self.make(50), logits, [item for item, _ in cases])
        assert torch.equal(logits, before)

    # --- batches and steps ---

    def test_sampled_tokens_are_the_same_alone_and_in_any_batch(self) -> None:
        rng = random.Random(3)
        sampler = self.make(1001)
        cases = [random_case(rng, 1001) for _ in range(25)]
        alone = [self.sample(sampler, logits, [item])[0] for item, logits in cases]
        for _ in range(8):
            chosen_cases = rng.sample(range(len(cases)), rng.randint(2, len(cases)))
            items, logits = [cases[i][0] for i in chosen_cases], [cases[i][1] for i in chosen_cases]
            assert self.sample(sampler, torch.cat(logits), items) == [alone[i] for i in chosen_cases]

    def test_sequences_that_come_grow_and_leave_follow_the_definition(self) -> None:
        """Whatever is kept of a sequence from step to step is its own, and is what its text says."""
        rng = random.Random(0)
        vocab_size = 90
        sampler = self.make(vocab_size)

        def sequence() -> Sequence:
            params = msgspec.structs.replace(
                random_params(rng, 12), allowed_token_ids=None, logit_bias={}, bad_words=[]
            )
            prompt = [rng.randrange(12) for _ in range(rng.randint(4, 9))]
            return Sequence(Request(request_id="r", prompt_token_ids=prompt, params=params), list(prompt))

        def scheduled(seq: Sequence) -> Scheduled:
            seq.draft_token_ids = [rng.randrange(3) for _ in range(rng.choice([0, 1, 3]))]
            seq.draft_parents = [rng.randrange(-1, i) for i in range(len(seq.draft_token_ids))]
            seq.num_computed_tokens = seq.num_tokens - 1
            num_drafts = len(seq.draft_token_ids)
            return Scheduled(seq, 1 + num_drafts, num_drafts, samples=True)

        seqs = [sequence() for _ in range(4)]
        num_accepted = 0
        for _ in range(12):
            batch = [scheduled(seq) for seq in seqs]
            logits = 2 * torch.randn(sum(item.num_logits for item in batch), vocab_size)
            logits[:, :12] += 2.0  # where the history is
            logits[:, :3] += 3.0  # and the drafts
            rows = logits.split([item.num_logits for item in batch])
            results = self.sample(sampler, logits, batch)
            for item, own, result in zip(batch, rows, results, strict=True):
                assert result == walk(item, own.numpy())
                item.seq.token_ids += result.token_ids
                num_accepted += len(result.accepted)
            del batch, item
            seqs[rng.randrange(len(seqs))] = sequence()
            seqs = rng.sample([*seqs, sequence()], len(seqs) + 1)[:5]
        assert num_accepted > 4

    def test_steps_launched_before_their_tokens_are_known_sample_what_they_would_afterwards(self) -> None:
        """Bans of words included, and penalties where the sampler counts itself: both depend on the last token."""
        sampler, vocab_size = self.make(30), 30
        builder = StepBuilder(16, vocab_size, counts_on_device=sampler.keeps_token_counts)
        assert not any(builder.sampling.needs_host(item) for item in _decoding(penalty=0.0))
        items = _decoding(penalty=2.0 if sampler.keeps_token_counts else 0.0)
        newest: Tensor | None = None
        tokens: list[list[int]] = []
        for step in range(12):
            plan = items if newest is None else [
                Scheduled(item.seq, 1, 0, True, num_ahead=1, source=row) for row, item in enumerate(items)
            ]  # fmt: skip
            logits = torch.randn(len(items), vocab_size).to(self.device)
            inputs = builder.build(plan)
            output = sampler.launch(logits, inputs.sampling, newest)
            if newest is not None:  # now the host learns what the step before sampled
                for item, token in zip(items, newest.tolist(), strict=True):
                    item.seq.token_ids.append(token)
                    item.seq.num_computed_tokens += 1
            assert inputs.sampling.positions.tolist() == [2 + seed + step for seed in range(4)]
            expected = self.sample(self.make(vocab_size), logits, items)
            assert output.finish(inputs) == expected
            newest = output.tokens
            tokens += [result.token_ids for result in expected]
        assert len({token for step in tokens for token in step}) > 6

    def test_chunks_that_do_not_sample_get_nothing_and_disturb_nobody(self) -> None:
        item = make_item(make_params(seed=3), prompt=[1, 2])
        chunk = replace(make_item(make_params(), prompt=[1, 2, 3]), samples=False)
        logits = torch.randn(1, 30)
        sampler = self.make(30)
        alone = self.sample(sampler, logits, [item])[0]
        assert self.sample(sampler, logits, [chunk, item, chunk]) == [Sampled([]), alone, Sampled([])]
        assert self.sample(sampler, logits[:0], [chunk]) == [Sampled([])]

    def test_lists_of_a_request_are_read_for_its_first_token_only(self) -> None:
        """What a step costs everybody else does not depend on how much one client has named."""
        rng = random.Random(5)
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
            sampler = self.make(50)
            expected = self.sample(sampler, logits, [item])
            for named in ("allowed_token_ids", "logit_bias", "bad_words", "stop_token_ids"):
                getattr(item.seq.params, named).clear()
            assert self.sample(sampler, logits, [item]) == expected

    # --- verification is sampling ---

    def test_drafts_change_how_many_tokens_come_and_never_which(self) -> None:
        """A toy model whose logits depend on the whole context, decoded plainly and through random trees of drafts."""
        rng = random.Random(5)
        vocab_size = 6
        sampler = self.make(vocab_size)

        def model(context: list[int]) -> Tensor:
            return torch.tensor([random.Random(f"{context} {token}").gauss(0, 2) for token in range(vocab_size)])

        def decode(params: SamplingParams, *, with_drafts: bool) -> tuple[list[int], int]:
            output, num_steps = [], 0
            while len(output) < 30:
                num_drafts = rng.randint(0, 8) if with_drafts else 0
                drafts = [rng.randrange(vocab_size) for _ in range(num_drafts)]
                parents = [rng.randrange(-1, i) for i in range(num_drafts)]
                item = make_item(params, prompt=[1, 2, 3], output=output, drafts=drafts, parents=parents)
                paths: list[list[int]] = [[]]
                for draft, parent in zip(drafts, parents, strict=True):
                    paths.append([*paths[parent + 1], draft])
                logits = torch.stack([model(item.seq.token_ids + path) for path in paths])
                output, num_steps = output + self.sample(sampler, logits, [item])[0].token_ids, num_steps + 1
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

    # --- what cannot be sampled ---

    @pytest.mark.parametrize("bad_row", [[math.nan] * 8, [0.0] * 7 + [math.nan], [0.0] * 7 + [INF], [-INF] * 8])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("top_p", [0.5, 1.0])
    def test_logits_that_are_not_finite_fail_their_request_alone(
        self, bad_row: list[float], temperature: float, top_p: float
    ) -> None:
        params = make_params(temperature=temperature, top_p=top_p, logprobs=1)
        items = [make_item(params, prompt=[1], output=[2] * i) for i in range(3)]
        logits = torch.randn(3, 8)
        sampler = self.make(8)
        healthy = self.sample(sampler, logits, items)
        logits[1] = torch.tensor(bad_row)
        results = self.sample(sampler, logits, items)
        assert results[1].token_ids == []
        assert "not finite" in results[1].error
        assert "position 2" in results[1].error
        assert [r.token_ids for r in (results[0], results[2])] == [r.token_ids for r in (healthy[0], healthy[2])]
        assert results[0].error is None

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_banning_every_token_fails_the_request_alone(self, temperature: float) -> None:
        params = make_params(temperature=temperature, top_k=2)
        items = [make_item(msgspec.structs.replace(params, **NOWHERE), prompt=[1]), make_item(params, prompt=[1])]
        results = self.sample(self.make(8), torch.zeros(2, 8), items)
        assert "no token is allowed" in results[0].error
        assert results[0].error_kind == "constraints"
        assert results[0].token_ids == []
        assert results[1].error is None
        assert len(results[1].token_ids) == 1

    def test_a_ban_does_not_hide_that_the_model_is_broken(self) -> None:
        logits = torch.zeros(1, 8)
        logits[0, 5] = INF
        (result,) = self.sample(self.make(8), logits, [make_item(make_params(bad_words=[[5]]), prompt=[1])])
        assert "not finite" in result.error

    def test_a_bad_row_behind_drafts_counts_only_when_decoding_gets_there(self) -> None:
        logits = torch.zeros(3, 8)
        logits[0, 5] = logits[1, 6] = 9.0
        sampler = self.make(8)
        item = make_item(make_params(temperature=0.0), prompt=[1], drafts=[5, 6])
        assert self.sample(sampler, logits, [item])[0] == Sampled([5, 6, 0], [0, 1])
        logits[2] = math.nan
        assert self.sample(sampler, logits, [item])[0] == Sampled([5, 6], [0])  # the next step meets it at the root
        other = make_item(make_params(temperature=0.0), prompt=[1], drafts=[4, 6])
        assert self.sample(sampler, logits, [other])[0] == Sampled([5])

    # --- log-probabilities ---

    @pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
    def test_logprobs_are_those_of_the_untouched_logits_whatever_changes_the_choice(self, scale: float) -> None:
        logits = (torch.randn(30, 200) * scale).bfloat16().float()  # with equal values
        logits[:10, 50:] = -INF
        fields = {
            "temperature": 0.8, "logit_bias": {7: 2.0}, "repetition_penalty": 1.3, "top_k": 30, "bad_words": [[9]],
        }  # fmt: skip
        items = [
            make_item(make_params(logprobs=n % 21, seed=n, **fields), prompt=[1, 2], output=[3]) for n in range(30)
        ]
        for n, (item, result) in enumerate(zip(items, self.sample(self.make(200), logits, items), strict=True)):
            num_top = item.seq.params.logprobs
            assert_close(result.logprobs, [expected_logprobs(logits[n], result.token_ids[0], num_top)])
            assert result.prompt_logprobs is None

    def test_every_emitted_token_has_its_logprobs_and_others_have_none(self) -> None:
        logits = torch.randn(5, 200)
        best = logits.argmax(-1).tolist()
        drafts, parents = [0, best[0], 1, best[2]], [-1, -1, 1, 1]  # the root's second child, then its second child
        greedy = {"temperature": 0.0}
        item = make_item(make_params(logprobs=3, **greedy), prompt=[5, 6], drafts=drafts, parents=parents)
        other = make_item(make_params(**greedy), prompt=[5])
        result, quiet = self.sample(self.make(200), torch.cat((logits, logits[:1])), [item, other])
        assert result.accepted == [1, 3]
        assert result.token_ids == [best[0], best[2], best[4]]
        assert_close(result.logprobs, [expected_logprobs(logits[row], best[row], 3) for row in (0, 2, 4)])
        assert quiet.logprobs is None

    def test_more_most_likely_tokens_than_there_are_tokens_are_all_tokens(self) -> None:
        logits = torch.randn(1, 5)
        (result,) = self.sample(self.make(5), logits, [make_item(make_params(logprobs=20), prompt=[1])])
        assert_close(result.logprobs, [expected_logprobs(logits[0], result.token_ids[0], 5)])

    @pytest.mark.parametrize("num_top", [0, 4])
    def test_a_prompt_in_chunks_is_scored_once_from_its_second_token_on(self, num_top: int) -> None:
        """Row i of the whole prompt predicts token i + 1; where the chunks end must not show."""
        rng = random.Random(num_top)
        sampler = self.make(200)
        prompt = [rng.randrange(200) for _ in range(40)]
        logits = torch.randn(len(prompt), 200)
        expected = [expected_logprobs(logits[i - 1], prompt[i], num_top) for i in range(1, len(prompt))]
        other = make_item(make_params(logprobs=2), prompt=[5])
        params = make_params(prompt_logprobs=num_top, temperature=0.0)
        request = Request(request_id="r", prompt_token_ids=prompt, params=params)
        for chunk_size in (40, 17, 3):
            seq = Sequence(request, list(prompt))
            found: list[TokenLogprobs] = []
            while seq.num_computed_tokens < len(prompt):
                start = seq.num_computed_tokens
                end = min(len(prompt), start + chunk_size)
                samples = end == len(prompt)
                item = Scheduled(seq, end - start, 0, samples, num_scored=end - start - samples)
                rows = torch.cat((logits[:1], logits[start:end], logits[:1]))
                result = self.sample(sampler, rows, [other, item, other])[1]
                assert result.token_ids == ([int(logits[-1].argmax())] if samples else [])
                found += result.prompt_logprobs or []
                seq.num_computed_tokens = end
            assert_close(found, expected)

    def test_a_scored_row_that_is_not_finite_fails_its_request_alone(self) -> None:
        logits = torch.randn(4, 200)
        items = []
        for _ in range(2):
            item = make_item(make_params(prompt_logprobs=0), prompt=[1, 2])
            item.seq.num_computed_tokens = 0
            items.append(replace(item, num_new_tokens=2, num_scored=1))
        logits[2, 5] = math.nan
        good, bad = self.sample(self.make(200), logits, items)
        assert good.error is None
        assert len(good.prompt_logprobs) == len(good.token_ids) == 1
        assert "not finite" in bad.error
        assert bad.prompt_logprobs is None


def assert_close(found: list[TokenLogprobs] | None, expected: list[TokenLogprobs]) -> None:
    assert found is not None
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_id, one.rank, one.top_token_ids) == (other.token_id, other.rank, other.top_token_ids)
        assert [one.logprob, *one.top_logprobs] == pytest.approx([other.logprob, *other.top_logprobs], abs=1e-5)
