"""Drafts of EAGLE heads are those of the definition, a pass over the whole text without any memory, at every step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.torch_backend import TorchAttention
from engine.batch.step_inputs import RowFacts, SamplingInputs
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.draft_matrix import make_draft_matrix
from engine.speculation.eagle import EagleProposer
from engine.speculation.eagle_head import FloatMatrix, Matrix
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, SamplingParams, Sequence
from tests.support.conformance.proposer import ProposerConformance
from tests.support.eagle_files import (
    BLOCK_SIZE,
    NUM_TARGET_LAYERS,
    TARGET_HIDDEN,
    VARIANTS,
    VOCAB,
    DenseEagle,
    TinyEagle,
    make_eagle,
    random_eagle,
)
from tests.support.speculating import make_model
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

NUM_DRAFTS = 4


class TestEagleProposer(ProposerConformance):
    guesses = False  # of texts that have no blocks

    def make(self, num_drafts: int) -> EagleProposer:
        """As wide as the engine's model, whose last states it takes."""
        eagle = random_eagle(aux=(), known=tuple(range(0, VOCAB, 3)), has_embedding=True)
        return make_eagle(eagle, make_model(), num_blocks=100, num_drafts=num_drafts)


class TestParallelEagleProposer(ProposerConformance):
    guesses = False

    def make(self, num_drafts: int) -> EagleProposer:
        eagle = random_eagle(aux=(), known=None, has_embedding=True, num_layers=2, mask_token=1)
        return make_eagle(eagle, make_model(), num_blocks=100, num_drafts=num_drafts)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": TARGET_HIDDEN, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=NUM_TARGET_LAYERS, vocab_size=VOCAB)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


@dataclass
class Checked:
    """A proposer whose every draft is compared with the definition's.

    answers: of each prompt, with which drafts are mended so that some are accepted; share_seen: of the steps
    """

    inner: EagleProposer
    dense: DenseEagle
    llama: LlamaForCausalLM
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    share_seen: float = 1.0
    num_compared: int = 0
    num_with_holes: int = 0
    num_undrafted: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def __post_init__(self) -> None:
        self.needs = self.inner.needs

    def propose(self, step: VerifiedStep) -> None:
        if self.rng.random() >= self.share_seen:
            return
        self.inner.propose(step)
        for seq in step.drafting:
            self._compare(seq)
            self._mend(seq)

    def _compare(self, seq: Sequence) -> None:
        known = self.inner._known[seq].is_known
        self.dense.unseen = [i for i in range(1, seq.num_tokens - 1) if not known[i]]
        self.num_with_holes += bool(self.dense.unseen)
        room = min(NUM_DRAFTS, seq.params.max_tokens - seq.num_output_tokens - 1)
        if room <= 0 or not seq.draft_token_ids:
            assert not seq.draft_token_ids
            self.num_undrafted += room > 0
            return
        hidden = self._hidden(seq.token_ids[:-1])
        assert seq.draft_token_ids == self.dense.chain(seq.token_ids, hidden, room)
        assert seq.draft_parents == list(range(-1, room - 1))
        self.num_compared += 1

    def _hidden(self, token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            states = self.llama(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        return torch.cat([states[-1][0], *(states[layer][0] for layer in self.dense.eagle.aux)], dim=1)

    def _mend(self, seq: Sequence) -> None:
        """The first few drafts become right."""
        answer = self.answers.get(tuple(seq.request.prompt_token_ids), [])
        for i in range(min(self.rng.randrange(4), len(seq.draft_token_ids))):
            if seq.num_output_tokens + i < len(answer):
                seq.draft_token_ids[i] = answer[seq.num_output_tokens + i]


def _engine(
    llama: LlamaForCausalLM,
    eagle: TinyEagle,
    *,
    num_blocks: int = 200,
    budget: int = 13,
    is_chain: bool = True,
    make_matrix: Callable[[Tensor], Matrix] = FloatMatrix,
    dtype: torch.dtype = torch.float32,
) -> tuple[Engine, Checked]:
    model = build_model(llama.config, dtype=torch.float32)
    model.load_weights(llama.state_dict().items())
    most = 1 if is_chain else 8
    proposer = make_eagle(
        eagle,
        model,
        num_blocks=num_blocks,
        num_drafts=NUM_DRAFTS,
        max_children=most,
        make_matrix=make_matrix,
        dtype=dtype,
    )
    checked = Checked(proposer, DenseEagle(eagle, model.embed_tokens.weight), llama)
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
    )
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=60, headroom=1)
    scheduler = Scheduler(KVCacheManager(num_blocks, BLOCK_SIZE), limits)
    runner = ModelRunner(model, cache, TorchAttention(cache))
    return engine_of(runner, scheduler, HostSampler(VOCAB), checked if is_chain else proposer, COST), checked


def _prompts(lengths: tuple[int, ...] = (5, 22, 17, 2, 1), *, shared: int = 0) -> list[list[int]]:
    rng = random.Random(4)
    beginning = [rng.randrange(VOCAB) for _ in range(shared)]
    return [beginning + [rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def _run(
    engine: Engine, prompts: list[list[int]], *, max_tokens: int = 22, hits: list[int] | None = None
) -> list[list[int]]:
    """The answers, greedy. hits: gets the prompt tokens that each step found in the prefix cache"""
    answers: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(seed=i, max_tokens=max_tokens, temperature=0.0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        outputs, _, stats = engine.step()
        if hits is not None:
            hits.append(stats.num_prefix_hits)
        for output in outputs:
            assert output.error is None
            answers[int(output.request_id)] += output.token_ids
    assert not engine.speculator.is_off
    return answers


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_drafts_what_its_definition_says(llama: LlamaForCausalLM, name: str) -> None:
    """Prompts come in chunks, drafts are accepted in part, and prefixes are warm the second time."""
    prompts = _prompts()
    engine, checked = _engine(llama, VARIANTS[name][1])
    answers = _run(engine, prompts)
    assert checked.num_compared > 50
    assert checked.num_with_holes == checked.num_undrafted == 0
    checked.answers = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    assert _run(engine, prompts) == answers
    assert checked.num_compared > 80


HEAD = VARIANTS["official"][1]


@pytest.mark.parametrize("num_blocks", [20, 26])
def test_drafts_are_right_after_preemptions(llama: LlamaForCausalLM, num_blocks: int) -> None:
    prompts = _prompts(shared=6)
    answers = _run(_engine(llama, HEAD)[0], prompts)
    engine, checked = _engine(llama, HEAD, num_blocks=num_blocks)
    checked.answers = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    for _ in range(2):
        assert _run(engine, prompts) == answers
    assert engine.scheduler.num_preemptions > 0
    assert checked.num_compared > 60


def test_a_prefix_of_another_is_known_but_for_what_nobody_was_shown(llama: LlamaForCausalLM) -> None:
    """The text behind a block decides nothing in it: two sequences go on from one prefix in different ways."""
    engine, checked = _engine(llama, HEAD)
    hits: list[int] = []
    for prompt in _prompts((3, 7, 9), shared=16):
        _run(engine, [prompt], hits=hits)
    assert sum(hits) == 2 * 16
    assert checked.num_with_holes == checked.num_undrafted == 0
    assert checked.num_compared > 40


def test_a_conversation_goes_on_with_the_rows_of_its_beginning(llama: LlamaForCausalLM) -> None:
    """To the last step of each request: none is missing."""
    engine, checked = _engine(llama, HEAD)
    text, hits = _prompts((9,))[0], list[int]()
    for _ in range(3):
        text = text + _run(engine, [text], max_tokens=9, hits=hits)[0] + [3, 1]
    assert sum(hits) >= 16 + 24
    assert checked.num_undrafted == checked.num_with_holes == 0
    assert checked.num_compared > 12


@pytest.mark.parametrize("share_seen", [0.8, 0.3])
@pytest.mark.parametrize("name", ["official", "P-EAGLE 3.1", "window"])
def test_steps_that_were_not_shown_leave_holes_and_nothing_stale(
    llama: LlamaForCausalLM, name: str, share_seen: float
) -> None:
    prompts = _prompts(shared=5)
    answers = _run(_engine(llama, VARIANTS[name][1])[0], prompts)
    engine, checked = _engine(llama, VARIANTS[name][1], num_blocks=26)
    checked.share_seen = share_seen
    for _ in range(4):
        assert _run(engine, prompts) == answers
    assert checked.num_with_holes > 10
    assert checked.num_compared > 10
    assert checked.num_undrafted > 0 or share_seen > 0.5


def test_trees_have_the_chances_of_their_definition(llama: LlamaForCausalLM) -> None:
    engine, checked = _engine(llama, HEAD, is_chain=False)
    num_trees = 0
    for i, prompt in enumerate(_prompts()):
        params = SamplingParams(seed=i, max_tokens=20, temperature=0.0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        engine.step()
        for seq in engine.scheduler.running:
            hidden = checked._hidden(seq.token_ids[:-1])
            paths: list[list[int]] = []
            for token, parent, chance in zip(
                seq.draft_token_ids, seq.draft_parents, seq.draft_confidences, strict=True
            ):
                before = paths[parent] if parent >= 0 else []
                paths.append([*before, token])
                logits = checked.dense.logits_after(seq.token_ids, hidden, before)
                assert HEAD.known is not None
                expected = float(logits.softmax(-1)[HEAD.known.index(token)])
                assert chance == pytest.approx(expected, rel=1e-3)
            num_trees += any(parent != i - 1 for i, parent in enumerate(seq.draft_parents))
    assert num_trees > 20


@pytest.mark.parametrize("name", ["official", "EAGLE 3.1", "P-EAGLE", "last states alone"])
@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
def test_weights_of_few_bits_change_few_drafts(llama: LlamaForCausalLM, kept: str, name: str) -> None:
    """On a CPU matrices are int8; on a GPU all of a head has the target's dtype."""
    eagle = VARIANTS[name][1]
    if kept == "int8":
        engine, checked = _engine(llama, eagle, is_chain=False, make_matrix=make_draft_matrix)
    else:
        engine, checked = _engine(llama, eagle, is_chain=False, dtype=torch.bfloat16)
    num_drafted = num_alike = 0
    for i, prompt in enumerate(_prompts()):
        params = SamplingParams(seed=i, max_tokens=20, temperature=0.0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        engine.step()
        for seq in engine.scheduler.running:
            if seq.draft_token_ids:
                hidden = checked._hidden(seq.token_ids[:-1])
                num_alike += seq.draft_token_ids[0] == checked.dense.chain(seq.token_ids, hidden, 1)[0]
                num_drafted += 1
    assert not engine.speculator.is_off
    assert num_drafted > 40
    assert num_alike > 0.9 * num_drafted


def _sample(logits: Tensor, seed: int, position: int, temperature: float) -> int:
    """What the target would sample at a position from these logits. [VOCAB]"""
    facts = RowFacts(
        seeds=np.array([seed], dtype=np.uint64),
        temperatures=np.array([temperature], dtype=np.float32),
        max_gaps=np.array([np.inf], dtype=np.float32),
        top_ks=np.array([VOCAB]),
        top_ps=np.array([1.0]),
        edits_before=np.array([0.0]),
        seq_of_row=np.array([0]),
    )
    inputs = SamplingInputs(logits_rows=np.array([0]), positions=np.array([position]), facts=facts)
    return int(HostSampler(VOCAB).launch(logits[None].float(), inputs).tokens[0])


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_drafts_are_what_a_target_with_the_heads_distribution_would_sample(
    llama: LlamaForCausalLM, temperature: float
) -> None:
    """They compete with the noise of their own positions."""
    eagle = VARIANTS["vllm, whole vocabulary"][1]
    engine, checked = _engine(llama, eagle, is_chain=False)
    for seed in range(4):
        params = SamplingParams(seed=seed, max_tokens=20, temperature=temperature)
        engine.add(Request(request_id=str(seed), prompt_token_ids=[1, 2, seed], params=params))
    num_unlikely = num_second = 0
    while engine.has_work:
        engine.step()
        for seq in engine.scheduler.running:
            if not seq.draft_token_ids:
                continue
            hidden, drafts = checked._hidden(seq.token_ids[:-1]), seq.draft_token_ids
            logits = checked.dense.logits_after(seq.token_ids, hidden, [])
            assert drafts[0] == _sample(logits, seq.params.seed, seq.num_tokens, temperature)
            num_unlikely += drafts[0] != int(logits.argmax())
            second = next((i for i, parent in enumerate(seq.draft_parents) if parent == 0), None)
            if second is not None:
                logits = checked.dense.logits_after(seq.token_ids, hidden, drafts[:1])
                assert drafts[second] == _sample(logits, seq.params.seed, seq.num_tokens + 1, temperature)
                num_second += 1
    assert num_unlikely > 3
    assert num_second > 10


def test_where_no_draft_is_worth_making_rows_are_kept_all_the_same(llama: LlamaForCausalLM) -> None:
    engine, checked = _engine(llama, HEAD)
    inner = checked.inner.propose

    def now_and_then(step: VerifiedStep) -> None:
        step.max_depth = checked.rng.choice((0, 0, 64))
        inner(step)
        if not step.max_depth:
            assert not any(seq.draft_token_ids for seq in step.drafting)
            step.drafting.clear()

    checked.inner.propose = now_and_then  # type: ignore[method-assign]
    _run(engine, _prompts())
    assert checked.num_compared > 15
    assert checked.num_with_holes == checked.num_undrafted == 0


@pytest.mark.parametrize("name", ["official", "P-EAGLE"])
def test_numbers_that_overflow_cost_their_own_sequence_its_drafts_and_no_other(
    llama: LlamaForCausalLM, name: str
) -> None:
    """Nor whoever gets its blocks later."""
    engine, checked = _engine(llama, VARIANTS[name][1], num_blocks=40)
    inner, poisoned = checked.inner.propose, list[Sequence]()

    def poison(step: VerifiedStep) -> None:
        for seq in engine.scheduler.running:
            if seq.request.request_id == "1" and seq in checked.inner._known:
                state = checked.inner._known[seq].state
                assert state is not None
                state.fill_(torch.inf)
                poisoned.append(seq)
        inner(step)
        for seq in [seq for seq in step.drafting if seq in poisoned]:
            assert not seq.draft_token_ids
            step.drafting.remove(seq)

    checked.inner.propose = poison  # type: ignore[method-assign]
    prompts = _prompts()
    _run(engine, prompts)
    assert len(poisoned) > 3
    assert checked.num_compared > 30
    checked.inner.propose = inner  # type: ignore[method-assign]
    for first in range(0, VOCAB, 4):
        _run(engine, [[first, *prompt] for prompt in prompts])
    assert checked.num_undrafted == 0
