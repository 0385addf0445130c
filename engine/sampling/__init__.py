"""From logits to tokens: penalties, truncation, noise, log-probabilities, and the acceptance of drafts.

Never runs a model. Begin with `sampler` (the order of operations, the protocol and the registry); `host_sampler` and
`triton_sampler` decide the same tokens.
"""
