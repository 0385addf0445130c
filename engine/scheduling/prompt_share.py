"""How many prompt tokens a step computes beside streams where no target is set: a share that grows with the streams.

With a target for the wait between tokens, `engine.scheduling.prompt_pacing` decides instead.
"""

from __future__ import annotations

from collections.abc import Iterable

PROMPT_SHARE = 3  # prompt tokens for each sequence that decodes in the same step
MAX_PROMPT_STEPS = 16  # beside others that decode, where the budget allows


def prompt_share(least: int, num_decoding: int, lengths: Iterable[int]) -> int:
    """Prompt tokens of a step that others decode in: each of their tokens waits for all of these.

    A step takes about as long as it has tokens, so that few streams would stutter with each prompt that fills the
    budget. The share grows with the streams, as many short answers need many prompts, and with the prompts, whose
    first tokens must not wait for hundreds of steps. lengths: of the sequences that are behind, in tokens
    """
    return max(least, PROMPT_SHARE * num_decoding, -(-max(lengths, default=0) // MAX_PROMPT_STEPS))
