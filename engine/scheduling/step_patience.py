"""How long a step may take before it is held to be hung: many times what steps were measured to take here."""

from __future__ import annotations

from typing import NamedTuple

from engine.ipc.messages import ModelInfo
from engine.types import Scheduled

MEASURED_FACTOR = 10.0  # how much longer than expected a step may take: others share the machine
CEILING_FACTOR = 30.0  # the same while all that is known is what the machine can do at best
PAIRS_PER_TOKEN = 1024  # that cost less than a token's matrix products do, while nothing has been measured
FORGETTING = 0.05  # share of the newest step: one that was slow by accident counts for some dozens after it
BYTES_PER_PARAMETER = 4


class StepSize(NamedTuple):
    """num_pairs: of a new token and one that it sees, at most"""

    num_tokens: int
    num_pairs: int


def size_of(batch: list[Scheduled]) -> StepSize:
    num_tokens = num_pairs = 0
    for item in batch:
        num_tokens += item.num_new_tokens
        num_pairs += item.num_new_tokens * (item.seq.num_computed_tokens + item.num_new_tokens)
    return StepSize(num_tokens, num_pairs)


class StepPatience:
    """Learns how long steps take, by their size in powers of two, and says how long another may.

    A step of so many times the tokens and the pairs takes at most so many times as long. So any step that was seen
    bounds all others, and the tightest bound is what is expected.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._seconds: dict[tuple[int, int], float] = {}  # the longest seen lately, by the size's bit lengths
        self._seconds_per_token = self._seconds_per_step = 0.0
        if model.flops_per_second:
            self._seconds_per_token = 2 * model.num_parameters / model.flops_per_second
        if model.bytes_per_second:
            self._seconds_per_step = BYTES_PER_PARAMETER * model.num_parameters / model.bytes_per_second

    def learn(self, size: StepSize, seconds: float) -> None:
        key = (size.num_tokens.bit_length(), size.num_pairs.bit_length())
        before = self._seconds.get(key, seconds)
        self._seconds[key] = max(seconds, before + FORGETTING * (seconds - before))

    def limit(self, size: StepSize) -> float:
        """Seconds after which such a step is held to be hung; 0 if unknown. Any thread may call it."""
        seen = list(self._seconds.items())
        if not seen:
            weight = size.num_tokens + size.num_pairs / PAIRS_PER_TOKEN
            return CEILING_FACTOR * (self._seconds_per_step + weight * self._seconds_per_token)
        return MEASURED_FACTOR * min(
            seconds * max(size.num_tokens / 2.0 ** (tokens - 1), size.num_pairs / 2.0 ** (pairs - 1), 1.0)
            for (tokens, pairs), seconds in seen
        )
