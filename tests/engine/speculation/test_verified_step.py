"""What a proposer is shown of each step: every token that stays, to the last, with the target's state behind it."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.runner.strict_runner import OneTokenRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.proposer import ProposerNeeds, draft_budget
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, SamplingParams, Sequence
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

VOCAB_SIZE, LAYERS = 40, (2, 0)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCAB_SIZE)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


class Watching:
    """Notes what it is shown of each token, and guesses: that the newest token comes again, or the one after it.

    Chains of two, or trees of two siblings.
    """

    def __init__(self, needs: ProposerNeeds, *, is_tree: bool) -> None:
        self.needs, self.is_tree = needs, is_tree
        self.shown: dict[Sequence, dict[int, torch.Tensor]] = {}  # by position
        self.num_prompt_chunks = 0
        self.ended: list[Sequence] = []

    def propose(self, step: VerifiedStep) -> None:
        if self.needs.hidden == "all":
            self._note_all(step)
        else:
            for seq, state in zip(step.drafting, step.newest_hidden(), strict=True):
                self.shown.setdefault(seq, {})[seq.num_tokens - 2] = state.clone()
        for seq in step.drafting:
            self._draft(seq)

    def _note_all(self, step: VerifiedStep) -> None:
        for seq, first, rows, tables, released in step.kept():
            assert seq.finish_reason or seq.num_computed_tokens == first + len(rows)
            assert len(tables[0]) * 4 >= first + len(rows)
            assert len(tables) == len(released)
            known = self.shown.setdefault(seq, {})
            assert first == 0 or first - 1 in known, "no token is left out"
            known |= {first + i: state.clone() for i, state in enumerate(step.hidden()[torch.from_numpy(rows)])}
            self.num_prompt_chunks += seq not in step.drafting and not seq.finish_reason
            self.ended += [seq] * (seq in step.ended)

    def _draft(self, seq: Sequence) -> None:
        newest = seq.token_ids[-1]
        tokens = [(newest + 1) % VOCAB_SIZE, newest] if self.is_tree else [newest, newest]
        size = len(tokens) if draft_budget(seq, 2) == 2 else 0
        seq.draft_token_ids, seq.draft_parents = tokens[:size], [-1, -1 if self.is_tree else 0][:size]


def _run(engine: Engine) -> None:
    rng = random.Random(4)
    for i, length in enumerate((5, 30, 17, 2)):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        stops = list(range(0, VOCAB_SIZE, 9)) if i == 3 else []  # which may be a draft that was right
        params = SamplingParams(
            seed=i, max_tokens=25, temperature=0.0, prompt_logprobs=1 if i == 1 else None, stop_token_ids=stops
        )
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        assert all(output.error is None for output in engine.step()[0])


def _engine(llama: LlamaForCausalLM, proposer: Watching, kind: str, *, num_blocks: int, implementation: str) -> Engine:
    model = build_model(llama.config, dtype=torch.float32, implementation=implementation)
    model.load_weights(llama.state_dict().items())
    model.show_inputs_of(proposer.needs.hidden_layers)
    cache = KVCache(model.attention_layers, num_blocks=num_blocks, block_size=4, codec=DenseCodec(torch.float32))
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=13, max_model_len=60, headroom=1)
    scheduler = Scheduler(KVCacheManager(num_blocks, 4, prefix_caching=False), limits)
    runner_class = OneTokenRunner if kind == "one token at a time" else ModelRunner
    runner = runner_class(model, cache, TorchAttention(cache))
    return engine_of(runner, scheduler, HostSampler(VOCAB_SIZE), proposer, COST)


@pytest.mark.parametrize("hidden", ["all", "newest"])
@pytest.mark.parametrize("kind", ["tree", "chain", "one token at a time"])
@pytest.mark.parametrize("num_blocks", [200, 18])
@pytest.mark.parametrize("implementation", ["own", "transformers"])
def test_every_token_that_stays_is_shown_with_the_states_of_the_target(
    llama: LlamaForCausalLM, implementation: str, num_blocks: int, kind: str, hidden: str
) -> None:
    needs = ProposerNeeds(num_drafts=2, hidden=hidden, hidden_layers=LAYERS)
    watching = Watching(needs, is_tree=kind == "tree")
    engine = _engine(llama, watching, kind, num_blocks=num_blocks, implementation=implementation)
    _run(engine)
    assert engine.scheduler.num_preemptions > 0 or num_blocks == 200
    assert sum(seq.num_accepted_drafts for seq in watching.shown) > 0
    assert watching.num_prompt_chunks > 3 or hidden == "newest"
    assert len(watching.shown) == 4
    assert hidden == "newest" or len(watching.ended) == 4
    for seq, known in watching.shown.items():
        with torch.inference_mode():
            states = llama(torch.tensor([seq.token_ids]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[-1][0], *(states[layer][0] for layer in LAYERS)], dim=1)
        assert len(known) > 5 or seq.finish_reason == "stop"
        assert hidden == "newest" or len(known) - seq.num_tokens in (-1, 0)
        assert hidden == "newest" or list(known) == list(range(len(known)))
        for position, state in known.items():
            torch.testing.assert_close(state, expected[position], rtol=1e-4, atol=1e-4)


def test_layers_that_the_model_does_not_have_are_refused(llama: LlamaForCausalLM) -> None:
    model = build_model(llama.config, dtype=torch.float32)
    with pytest.raises(ValueError, match="input of layer 3; the model has layers 0 to 2"):
        model.show_inputs_of((0, 3))
