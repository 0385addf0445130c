"""The whole engine on Triton's kernels: the same tokens as on torch's."""

import pytest
import torch

from engine.attention.backend import AttentionBackend
from engine.attention.torch_backend import TorchAttention
from engine.attention.triton_backend import TritonAttention
from engine.kv_cache.codec import make_codec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.speculation.proposer import ProposerNeeds
from engine.speculation.verified_step import VerifiedStep
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST, VOCAB_SIZE, answer_three, make_model

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


class TreeProposer:
    """Guesses two tokens after the newest, and one after the first of them."""

    needs = ProposerNeeds(num_drafts=3)

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            newest = seq.token_ids[-1]
            seq.draft_token_ids = [newest, (newest + 1) % VOCAB_SIZE, newest]
            seq.draft_parents = [-1, -1, 0]


PROPOSERS = {
    "none": NoProposer,
    "ngram": lambda: NgramProposer(num_drafts=3, ngram_max=3, ngram_min=1),
    "tree": TreeProposer,
}


def _outputs(
    model: str, attention: type[AttentionBackend], device: torch.device, proposer: str, kept: str
) -> dict[str, list[int]]:
    llama = make_model(model).to(device)
    cache = KVCache(llama.attention_layers, num_blocks=60, block_size=4, codec=make_codec(kept), device=device)
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=60, headroom=4)
    runner = ModelRunner(llama, cache, attention(cache))
    scheduler = Scheduler(KVCacheManager(60, 4, windows=windows_of(llama.attention_layers)), limits)
    sampler = HostSampler(VOCAB_SIZE)
    return answer_three(engine_of(runner, scheduler, sampler, PROPOSERS[proposer](), COST))


@pytest.mark.parametrize(
    ("model", "proposer", "kept"),
    [
        ("full", "none", "float32"),
        ("full", "tree", "float32"),
        ("window", "ngram", "float32"),
        ("mixed", "tree", "float32"),
        ("full", "none", "int8"),
        ("mixed", "tree", "int8"),
    ],
)
def test_the_engine_says_the_same_on_triton_as_on_torch(
    device: torch.device, model: str, proposer: str, kept: str
) -> None:
    found = _outputs(model, TritonAttention, device, proposer, kept)
    assert found == _outputs(model, TorchAttention, torch.device("cpu"), proposer, kept)


def test_drafts_change_nothing_over_fp8(device: torch.device) -> None:
    """A tree's accepted path is moved with its scales."""
    plain, tree = (_outputs("full", TritonAttention, device, proposer, "fp8") for proposer in ("none", "tree"))
    assert plain == tree
