"""The laws of an executor (`engine.runner.executor.Executor`): a step is its inputs, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.step_file import StepFile
from engine.batch.step_inputs import StepInputs
from engine.kv_cache.manager import KVCacheManager
from engine.runner.executor import Executor, InFlightStep, StepResult
from engine.runner.step_builder import StepBuilder
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence

NUM_BLOCKS = 120  # that an executor under test must have room for, in each group of layers
VOCAB_SIZE = 40

Run = Callable[[Executor, StepInputs], StepResult]


def run(executor: Executor, inputs: StepInputs) -> StepResult:
    return executor.run(inputs)


class Session:
    """A host side of its own for an executor: texts that grow by what steps sample."""

    def __init__(self, executor: Executor, windows: list[int | None], block_size: int, run: Run = run) -> None:
        self.executor, self._run = executor, run
        self.kv = KVCacheManager(NUM_BLOCKS * len(windows), block_size, windows=windows, prefix_caching=False)
        self.builder = StepBuilder(
            block_size,
            executor.vocab_size,
            num_groups=len(windows),
            counts_on_device=executor.keeps_token_counts,
        )

    def start(self, name: str, prompt: list[int], **params: object) -> Sequence:
        settings = SamplingParams(**{"seed": 3, "max_tokens": 100, "temperature": 0.7, **params})
        return Sequence(Request(request_id=name, prompt_token_ids=prompt, params=settings), list(prompt))

    def plan(self, seq: Sequence, size: int = 1000, drafts: list[int] | None = None, **fields: int) -> Scheduled:
        """The next tokens of a sequence, at most so many, and drafts behind them; each draft a chain by default."""
        num_new = min(size, seq.num_tokens - seq.num_computed_tokens)
        samples = seq.num_computed_tokens + num_new == seq.num_tokens
        seq.draft_token_ids = drafts or []
        seq.draft_parents = list(range(-1, len(seq.draft_token_ids) - 1))
        num_drafts = len(seq.draft_token_ids) if samples else 0
        assert self.kv.allocate(seq, seq.num_computed_tokens + num_new + num_drafts + fields.get("num_ahead", 0))
        return Scheduled(seq, num_new + num_drafts, num_drafts, samples, **fields)

    def step(self, *items: Scheduled) -> StepResult:
        result = self._run(self.executor, self.builder.build(list(items)))
        self.builder.launched()
        for item, sampled in zip(items, result.sampled, strict=True):
            self.keep(item, sampled)
        return result

    def keep(self, item: Scheduled, sampled: Sampled) -> None:
        assert sampled.error is None
        item.seq.num_computed_tokens += item.num_new_tokens - item.num_drafts + len(sampled.accepted)
        item.seq.token_ids += sampled.token_ids
        self.kv.commit(item.seq)

    def decode(self, *seqs: Sequence, num_steps: int = 6) -> None:
        for _ in range(num_steps):
            self.step(*(self.plan(seq) for seq in seqs))

    def leave(self, seq: Sequence) -> None:
        self.kv.free(seq)


class ExecutorConformance:
    """Texts are greedy or sampled; an answer is what a session says of a prompt, however its steps are cut and sent."""

    accepts_trees = True
    compares_hidden = 1e-4  # how far the features of a row may be apart when other rows are computed beside it

    @pytest.fixture(autouse=True)
    def _reproducible(self, one_thread_and_seed: None) -> Iterator[None]:
        """Every test begins with the same seed."""
        with torch.inference_mode():
            yield

    def make(self) -> tuple[Executor, list[int | None], int]:
        """An executor that has run nothing, the windows of its groups of layers, and the size of its blocks.

        Of VOCAB_SIZE tokens, with NUM_BLOCKS blocks for each group.
        """
        raise NotImplementedError

    def session(self, run: Run = run) -> Session:
        executor, windows, block_size = self.make()
        assert executor.vocab_size == VOCAB_SIZE
        return Session(executor, windows, block_size, run)

    def prompts(self) -> list[list[int]]:
        rng = random.Random(5)
        return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (29, 3, 18)]

    def answers(self, session: Session, **params: object) -> list[list[int]]:
        """Of all prompts together, in whole steps."""
        seqs = [session.start(str(i), prompt, **params) for i, prompt in enumerate(self.prompts())]
        session.decode(*seqs, num_steps=7)
        return [seq.token_ids for seq in seqs]

    def test_a_text_is_the_same_alone_and_in_pieces(self) -> None:
        together = self.answers(self.session())
        session = self.session()
        for prompt, expected in zip(self.prompts(), together, strict=True):
            seq = session.start("a", prompt)
            while seq.num_tokens == len(prompt):
                session.step(session.plan(seq, 4))
            session.decode(seq, num_steps=6)
            assert seq.token_ids == expected
            session.leave(seq)

    def test_a_step_may_be_run_again(self) -> None:
        """It writes the same keys and values to the same places: retrying a step that failed half-way relies on it."""

        def twice(executor: Executor, inputs: StepInputs) -> StepResult:
            first = [one.token_ids for one in executor.run(inputs).sampled]
            result = executor.run(inputs)
            assert [one.token_ids for one in result.sampled] == first
            return result

        assert self.answers(self.session(twice)) == self.answers(self.session())

    def test_a_step_from_a_file_is_the_step(self, tmp_path: Path) -> None:
        def through_a_file(executor: Executor, inputs: StepInputs) -> StepResult:
            StepFile(config_json="{}", has_contents=True, inputs=inputs).write(tmp_path / "step")
            return executor.run(StepFile.read(tmp_path / "step").inputs)

        params = {"logprobs": 2, "top_p": 0.9, "logit_bias": {3: 1.0}, "repetition_penalty": 1.2}
        assert self.answers(self.session(through_a_file), **params) == self.answers(self.session(), **params)

    def test_what_was_told_already_may_be_told_again(self) -> None:
        """Block tables are changed by entries; a host that does not know whether a step was launched repeats them."""
        session = self.session()
        told: list[np.ndarray] = []

        def retold(executor: Executor, inputs: StepInputs) -> StepResult:
            told.append(inputs.table_changes.entries)
            entries = np.concatenate(told[-2:])
            return executor.run(replace(inputs, table_changes=replace(inputs.table_changes, entries=entries)))

        session._run = retold
        assert self.answers(session) == self.answers(self.session())

    def test_rows_of_tables_and_blocks_go_to_others(self) -> None:
        """Forty texts, of which four are there at once: nothing of one is seen by the next that has its place."""
        session, rng = self.session(), random.Random(8)
        running: list[Sequence] = []
        alone = self.session()
        for i in range(40):
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
            running.append(session.start(str(i), prompt))
            session.decode(*running, num_steps=rng.randrange(1, 4))
            if len(running) == 4:
                seq = running.pop(rng.randrange(4))
                session.leave(seq)
                if i % 5 == 0:
                    again = alone.start(seq.request.request_id, seq.request.prompt_token_ids)
                    alone.decode(again, num_steps=seq.num_output_tokens)
                    assert again.token_ids == seq.token_ids
                    alone.leave(again)

    def test_right_drafts_are_accepted_and_wrong_ones_change_nothing(self) -> None:
        plain, drafted = self.session(), self.session()
        prompt = self.prompts()[0]
        seq = plain.start("a", prompt)
        plain.decode(seq, num_steps=14)
        other = drafted.start("a", prompt)
        drafted.decode(other, num_steps=1)
        num_accepted = 0
        for wrong in (False, True, False, True):
            truth = seq.token_ids[other.num_tokens :][:2]
            drafts = [truth[0], (truth[1] + 1) % VOCAB_SIZE] if wrong else truth
            (sampled,) = drafted.step(drafted.plan(other, drafts=drafts)).sampled
            num_accepted += len(sampled.accepted)
            assert len(sampled.accepted) == (1 if wrong else 2)
        assert other.token_ids == seq.token_ids[: other.num_tokens]
        assert num_accepted == 6

    def test_the_accepted_path_of_a_tree_is_where_a_chain_would_be(self) -> None:
        if not self.accepts_trees:
            pytest.skip("this executor verifies chains")
        plain, drafted = self.session(), self.session()
        seqs = [plain.start(str(i), prompt) for i, prompt in enumerate(self.prompts())]
        plain.decode(*seqs, num_steps=14)
        others = [drafted.start(str(i), prompt) for i, prompt in enumerate(self.prompts())]
        drafted.decode(*others, num_steps=1)
        for _ in range(4):
            items = []
            for seq, other in zip(seqs, others, strict=True):
                truth = seq.token_ids[other.num_tokens :][:2]
                wrong = (truth[0] + 1) % VOCAB_SIZE
                item = drafted.plan(other, drafts=[wrong, truth[0], wrong, truth[1]])
                other.draft_parents = [-1, -1, 0, 1]
                items.append(item)
            assert [one.accepted for one in drafted.step(*items).sampled] == [[1, 3]] * 3
        for seq, other in zip(seqs, others, strict=True):
            assert other.token_ids == seq.token_ids[: other.num_tokens]

    def test_the_newest_tokens_may_be_on_the_device(self) -> None:
        """Every second step is launched behind the one that samples its tokens, with a prompt chunk beside them."""
        session, expected = self.session(), self.answers(self.session())
        *seqs, late = (session.start(str(i), prompt) for i, prompt in enumerate(self.prompts()))

        def launch(items: list[Scheduled], newest: Tensor | None = None) -> InFlightStep:
            step = session.executor.launch(session.builder.build(items), newest)
            session.builder.launched()
            return step

        for _ in range(3):
            items = [session.plan(seq) for seq in seqs]
            step = launch(items)
            ahead = []
            for row, item in enumerate(items):
                ahead.append(Scheduled(item.seq, 1, 0, True, num_ahead=item.num_new_tokens, source=row))
                assert session.kv.allocate(item.seq, ahead[-1].num_computed_tokens + 1)
            ahead.append(session.plan(late, 5))
            queued = launch(ahead, step.tokens)
            for done, result in ((items, step.finish()), (ahead, queued.finish())):
                for item, sampled in zip(done, result.sampled, strict=True):
                    session.keep(item, sampled)
        session.decode(late, num_steps=1)
        assert late.token_ids == expected[2][: late.num_tokens]
        for seq, answer in zip(seqs, expected, strict=False):
            assert seq.num_output_tokens == 6
            assert seq.token_ids == answer[: seq.num_tokens]

    def test_hidden_states_are_of_the_rows_that_are_asked_for(self) -> None:
        session = self.session()
        seqs = [session.start(str(i), prompt) for i, prompt in enumerate(self.prompts())]
        inputs = session.builder.build([session.plan(seq) for seq in seqs])
        usual = session.executor.run(inputs).hidden
        assert usual is not None
        usual = usual.clone()
        whole = session.executor.run(replace(inputs, hidden_rows=np.arange(inputs.num_tokens))).hidden
        assert whole is not None
        assert whole.shape == (inputs.num_tokens, usual.shape[1])
        whole = whole.clone()
        torch.testing.assert_close(whole[inputs.logits_rows], usual, rtol=0, atol=self.compares_hidden)
        some = np.array([inputs.num_tokens - 1, 0, 7])
        found = session.executor.run(replace(inputs, hidden_rows=some)).hidden
        torch.testing.assert_close(found, whole[torch.from_numpy(some)], rtol=0, atol=self.compares_hidden)

    def test_memory_that_is_kept_for_speed_may_go_at_any_time(self) -> None:
        def forgetful(executor: Executor, inputs: StepInputs) -> StepResult:
            executor.release_memory()
            return executor.run(inputs)

        assert self.answers(self.session(forgetful)) == self.answers(self.session())

    def test_a_sequence_without_a_token_fails_alone(self) -> None:
        session = self.session()
        seqs = [session.start("bad", [1, 2], allowed_token_ids=[3], bad_words=[[3]]), session.start("good", [1, 2])]
        result = session.executor.run(session.builder.build([session.plan(seq) for seq in seqs]))
        bad, good = result.sampled
        assert bad.error is not None
        assert good.error is None
        assert len(good.token_ids) == 1
