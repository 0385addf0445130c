"""Where one answer stands in its grammar: a function of the tokens that were accepted, and of nothing else."""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from engine.types import Sampled, Sequence

if TYPE_CHECKING:
    from llguidance import LLMatcher

_BROKEN = "the answer left its grammar, which is too complex to follow here: {reason}; simplify it"


class GrammarState:
    """The state of a sequence's grammar. Used by one thread at a time: the engine's, or the one that fills masks.

    matcher: llguidance's, when it is compiled; bans_eos: the request does not end with the end-of-text token
    """

    def __init__(self, seq: Sequence, opening: Future[LLMatcher]) -> None:
        self.num_followed = seq.num_output_tokens
        self.bans_eos = False
        self._opening = opening

    @property
    def is_open(self) -> bool:
        """Whether it is known what may come; or why it never will be."""
        return self._opening.done()

    def wait(self, seconds: float) -> None:
        """Until it is open, but no longer than this."""
        wait([self._opening], timeout=seconds)

    def failure(self) -> BaseException | None:
        """Of one that is open: why there is no state."""
        return self._opening.exception()

    @property
    def matcher(self) -> LLMatcher:
        return self._opening.result()

    def follow(self, sampled: Sampled) -> None:
        """Goes on by a step's tokens. Where the grammar is over behind one of them, the rest is cut off.

        A step that found no allowed token ends the text, if the grammar allows that; else it is the request's error.
        """
        matcher = self.matcher
        if sampled.error is not None:
            if sampled.error_kind == "constraints" and matcher.is_accepting():
                sampled.error, sampled.is_over = None, True
            return
        num_followed = matcher.try_consume_tokens(sampled.token_ids)
        self.num_followed += num_followed
        if matcher.is_error() or (num_followed < len(sampled.token_ids) and not matcher.is_stopped()):
            sampled.error = _BROKEN.format(reason=matcher.get_error() or "a token that it does not allow")
            sampled.error_kind, sampled.token_ids = "constraints", []
        elif matcher.is_stopped():
            del sampled.token_ids[num_followed:]
            sampled.is_over = True

    def num_valid(self, token_ids: list[int]) -> int:
        """How many of these tokens, one after the other, the grammar would allow next."""
        return self.matcher.validate_tokens(token_ids)

    def forced(self) -> list[int]:
        """The tokens that spell what must come next, as the tokenizer would: masks allow one after the other, alone."""
        return self.matcher.compute_ff_tokens()
