"""How the tests of whole engines have requests answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.types import Request, TokenLogprobs

Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]  # tokens, their log-probabilities, the prompt's


@dataclass(frozen=True)
class Answered:
    """answers: by request id; num_accepted_drafts: of all of them"""

    answers: dict[str, Answer]
    num_accepted_drafts: int

    @property
    def tokens(self) -> dict[str, list[int]]:
        return {name: tokens for name, (tokens, _, _) in self.answers.items()}


def answer_all(engine: Engine, requests: Sequence[Request], *, at_once: int = 100) -> Answered:
    """Runs the requests to their ends, so many of them started in each step. None may fail."""
    answers: defaultdict[str, Answer] = defaultdict(lambda: ([], [], []))
    num_accepted = 0
    pending = list(requests)
    while pending or engine.has_work:
        for request in pending[:at_once]:
            engine.add(request)
        del pending[:at_once]
        for output in engine.step()[0]:
            assert output.error is None
            tokens, logprobs, prompt_logprobs = answers[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            prompt_logprobs += output.prompt_logprobs or []
            num_accepted += output.timing.num_accepted_drafts if output.finish_reason else 0
    return Answered(dict(answers), num_accepted)
