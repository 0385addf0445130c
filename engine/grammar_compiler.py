"""Compiles grammars for one model's vocabulary, with the library llguidance, within limits that no grammar can pass.

The server and the engine compile each grammar alike: the server in a process that may be killed, so that what is
refused, or never ends, is the client's error and costs the engine nothing; the engine, what the server has let through.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from engine.grammar import GrammarSpec, looks_like_tag, serialised

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_SYMBOLS = 200_000
MAX_LEXER_STATES = 65_536  # about 2 kB each, of all texts that follow the grammar together
COMPILE_FUEL = 1_000_000  # of regular expressions: about 20 ms
STEP_FUEL = 200_000  # of one mask: about 14 ms
STEP_ITEMS = 50_000  # of one mask: about 3 ms


class GrammarError(ValueError):
    """A grammar that cannot be enforced, and why."""


class GrammarCompiler:
    """One model's vocabulary as grammars see it: the bytes of its tokens, and which end the text.

    Making it takes some tenths of a second and tens of megabytes, so that it is made when the first grammar comes.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: list[int]) -> None:
        """vocab_size: of the model. Raises GrammarError for a tokenizer whose tokens have no bytes."""
        from llguidance import LLTokenizer  # a library of 8 MB, for those who need it

        added = json.loads(tokenizer_json).get("added_tokens") or []
        self._special_tokens = [
            token["content"] for token in added if token.get("special") or looks_like_tag(token["content"])
        ]
        num_tokens = max([vocab_size, *(int(token["id"]) + 1 for token in added)])  # ids may lie beyond the model's
        self.vocab_size = vocab_size
        self.eos_token_ids = [token for token in eos_token_ids if token < num_tokens]
        eos = self.eos_token_ids or [num_tokens]  # without any, a token that no model samples
        num_tokens = max(num_tokens, *(token + 1 for token in eos))
        try:
            self.tokenizer: LLTokenizer = LLTokenizer(tokenizer_json, n_vocab=num_tokens, eos_token=eos)
        except (ValueError, RuntimeError) as error:
            raise GrammarError(f"this model's tokenizer cannot be constrained: {_first_line(str(error))}") from error

    @property
    def num_words(self) -> int:
        """32-bit words of a mask, one bit per token."""
        return -(-self.tokenizer.vocab_size // 32)

    def compile(self, spec: GrammarSpec) -> LLMatcher:
        """The grammar at the beginning of a text; copies of it are cheap. Raises GrammarError."""
        from llguidance import LLMatcher

        try:
            text = serialised(spec, self._special_tokens)
        except RecursionError as error:
            raise GrammarError("it is nested too deeply") from error
        except ValueError as error:
            raise GrammarError(f"it cannot be read: {error}") from error
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is the slowest, and shows whether there is one
        if matcher.is_error():
            raise GrammarError(explained(matcher.get_error()))
        return matcher


def explained(reason: str) -> str:
    """An error of llguidance's in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if reason.startswith("NoExtension"):
        return "no text follows it: what it asks for is contradictory, or refers to itself without end"
    wanted = [line.removeprefix("error: ") for line in lines if line.startswith("error:")] or lines[:1]
    return (wanted[0] if wanted else "it cannot be compiled")[:1000]


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "unknown"
