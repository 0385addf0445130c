"""Turns logits into tokens. Sampling is verification: ordinary sampling is the case of zero drafts.

Every row is sampled from the target model with noise that depends on the seed, the position and the token id alone
(`engine.sampling.noise`). A draft is right when it is the token that would have been sampled anyway, so drafts change
the speed of a request and never its output, and neither does what else is in the batch.

The order of operations is vLLM's from the temperature on:

    raw logits -> [log-probabilities]      engine.logprobs
      -> penalties, bias, bans             engine.penalties, engine.logit_edits
      -> temperature                       here
      -> min-p -> top-k -> top-p           engine.truncation, engine.nucleus
      -> largest of noise + logit          engine.gumbel
      -> walk down the drafts              engine.pending

Greedy rows take the largest logit after the bans. A temperature below 1e-5 is greedy.

What `host_sampler` decides, `kernels.reference.sampling` defines; `triton_sampler` decides the same on a GPU.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.arrays import Ints
from engine.sampling.output import Pending
from engine.types import Sampled, Scheduled

SAMPLERS = {
    "torch": "engine.sampling.host_sampler:HostSampler",
    "numba": "engine.sampling.numba_sampler:NumbaSampler",
    "triton": "engine.sampling.triton_sampler:TritonSampler",
}

GREEDY_BELOW = 1e-5  # the noise, at most 22, could not reverse a difference of 3e-4 between logits


class TokenSampler(Protocol):
    """What the engine asks of a sampler, which is made with the vocabulary's size."""

    def __call__(self, logits: Tensor, batch: list[Scheduled]) -> list[Sampled]:
        """Decides the tokens of every item, one `Sampled` each, and waits for them."""
        ...

    def launch(self, logits: Tensor, batch: list[Scheduled], positions: Ints | None = None) -> Pending:
        """Queues all that decides the tokens of every item. The logits stay as they are.

        logits: [sum of num_logits, vocab_size] float32. A request for which nothing can be sampled gets an error of
        its own; no request can make this raise.

        positions: [len(batch)] where each item's token goes, if the sequences do not show it yet, because their newest
        tokens are pending themselves. Each item then decodes one token, has one logits row, and does not need its
        text (`engine.sampling.logit_processors.needs_token_history`).
        """
        ...
