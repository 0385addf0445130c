"""The pace of prompts beside streams: chunks as long as a step of the target's time has room for.

Each token of a running stream waits for a whole step, so a step's time is the wait between tokens, and what of it the
streams leave is the prompts'. `StepTimes` says how much that is: less where the prompt has come far, since each of its
tokens then attends to all before it. Where nobody streams nothing is paced, so that a prompt alone is as fast as ever.
"""

from __future__ import annotations

from engine.scheduling.step_times import StepTimes
from engine.scheduling.step_work import StepWork
from engine.types import PromptLimit, Sequence

AIM = 0.95  # of the target: half of all steps take longer than was foretold
LEAST_SHARE = 0.25  # of the time that the streams take alone, which prompts get however far the target is exceeded
LEAST_TOKENS = 4  # of a prompt in any step, so that none stands still where even that share is too short

_Place = tuple[int, int, int]  # a sequence's arrival, its computed tokens, rows of the step before its own


class PromptPacing:
    """Finds the chunk of each prompt of a step. Runs in the engine's thread.

    A target that the streams alone exceed, or nearly, cannot be met: prompts then get their least share, and go on.
    """

    def __init__(self, times: StepTimes, *, target: float) -> None:
        """target: seconds of a step"""
        self.times, self.target = times, target
        self._foreseen: dict[_Place, int] = {}

    def begin(self, streams: StepWork) -> StepPace:
        """The pace of a step that computes this for its streams."""
        return StepPace(self, streams, self._foreseen)

    def foresee(self, streams: StepWork) -> StepPace:
        """The same for the step after the one that is running. What it finds is found again when its time has come,
        whatever was learned meanwhile: it may have been launched so."""
        self._foreseen = {}
        return StepPace(self, streams, self._foreseen, keeps=True)

    def seconds_for(self, streams: StepWork) -> tuple[float, PromptLimit]:
        """Of a step that computes this for its streams, with its prompts; and which of the two bounds that is."""
        least = (1 + LEAST_SHARE) * self.times.seconds(streams)
        return (least, "least") if least > AIM * self.target else (AIM * self.target, "target")


class StepPace:
    """How much of each prompt one step has room for, in the order in which they are asked about.

    limit: what has ended the prompts' part so far
    """

    def __init__(
        self, pacing: PromptPacing, streams: StepWork, foreseen: dict[_Place, int], *, keeps: bool = False
    ) -> None:
        self._times, self._work, self._foreseen, self._keeps = pacing.times, streams, foreseen, keeps
        self._seconds, self._bound = pacing.seconds_for(streams)
        self._num_left = LEAST_TOKENS
        self.limit: PromptLimit = ""

    def room(self, seq: Sequence, num_computed: int, most: int) -> int:
        """The tokens of the sequence's next chunk, which is then in the step. 0 to most, of which it lacks as many.

        num_computed: when the step begins
        """
        place = (seq.arrival, num_computed, self._work.num_tokens)
        known = None if self._keeps else self._foreseen.get(place)
        least = min(self._num_left, most)
        number = self._longest(num_computed, least, most) if known is None else min(known, most)
        if self._keeps:
            self._foreseen[place] = number
        self._num_left = max(self._num_left - number, 0)
        self._work = self._work.with_chunk(num_computed, number)
        if number < most:
            self.limit = self._bound if number > least else "least"
        elif not self.limit:
            self.limit = "none"
        return number

    def _longest(self, num_computed: int, least: int, most: int) -> int:
        """The most tokens with which the step takes no longer than it may: its time grows with them."""
        if self._fits(num_computed, most):
            return most
        low, high = least, most  # `high` does not fit
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(num_computed, middle):
                low = middle
            else:
                high = middle
        return low

    def _fits(self, num_computed: int, num_new_tokens: int) -> bool:
        return self._times.seconds(self._work.with_chunk(num_computed, num_new_tokens)) <= self._seconds
