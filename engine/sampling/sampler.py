"""Turns logits into tokens. Sampling is verification: ordinary sampling is the case of zero drafts.

Every row is sampled from the target model with noise that depends on the seed, the position and the token id alone
(`engine.sampling.noise`). A draft is right when it is the token that would have been sampled anyway, so drafts change
the speed of a request and never its output, and neither does what else is in the batch.

The order of operations is vLLM's from the temperature on:

    raw logits -> [log-probabilities]      logprobs.py
      -> the grammar's mask                engine/structured
      -> penalties, bias, bans             logit_processors.py
      -> temperature                       host_sampler.py
      -> min-p -> top-k -> top-p           truncation.py
      -> largest of noise + logit          gumbel.py
      -> walk down the drafts              acceptance.py

Greedy rows take the largest logit after the bans. A temperature below 1e-5 is greedy.

What `host_sampler` decides, `kernels.reference.sampling` defines; `triton_sampler` decides the same on a GPU.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.batch.step_inputs import SamplingInputs
from engine.sampling.output import SamplerOutput

SAMPLERS = {
    "torch": "engine.sampling.host_sampler:HostSampler",
    "numba": "engine.sampling.numba_sampler:NumbaSampler",
    "triton": "engine.sampling.triton_sampler:TritonSampler",
}


class TokenSampler(Protocol):
    """What an executor asks of a sampler, which is made with the vocabulary's size and the threads that it may use.

    keeps_token_counts: whether it counts the tokens of penalised sequences itself, as `CountChanges` tell it
    """

    keeps_token_counts: bool

    def launch(self, logits: Tensor, inputs: SamplingInputs, newest: Tensor | None = None) -> SamplerOutput:
        """Queues all that decides the tokens of a step's sampled rows. The logits stay as they are.

        logits: [num_logits, vocab_size] float32. A row for which nothing can be sampled gets a negative token; no
        request can make this raise.

        newest: what the step before sampled, on the device, where the inputs name any of it: the host may not know yet.
        """
        ...
