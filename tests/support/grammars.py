"""A vocabulary of 24 tokens that can spell small JSON, for models that know no more, and grammars of its texts."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.grammar import GrammarSpec
from engine.grammar_compiler import GrammarCompiler
from engine.structured.grammar_states import GrammarStates

TOKENS = (
    "{", "}", '"', "a", "b", "c", ":", ",", "[", "]", "0", "1", "2", "-", '{"', '":', "ab", "abc", '",', '"}', "],",
    ".", "d", "<end>",
)  # fmt: skip
MERGES = [("{", '"'), ('"', ":"), ("a", "b"), ("ab", "c"), ('"', ","), ('"', "}"), ("]", ",")]
EOS = TOKENS.index("<end>")

OBJECT = GrammarSpec(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "abc": {"type": "array", "items": {"enum": ["a", "ab", "abc"]}, "maxItems": 4},
                "b": {"type": "integer", "minimum": -12, "maximum": 212},
                "c": {"type": "string", "pattern": "^[abc]{2,9}$"},
            },
            "required": ["abc", "b", "c"],
            "additionalProperties": False,
        }
    ),
    blanks=None,
)
NUMBER = GrammarSpec("regex", r"-?[12][012]{0,6}(\.[012]+)?")
CHOICE = GrammarSpec("lark", 'start: "abcabc" | "abba" | "cab" | "ab"')
NESTED = GrammarSpec("lark", 'start: "[" (start ("," start)*)? "]" | "a"')


def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer.to_str()


def make_compiler(vocab_size: int = len(TOKENS)) -> GrammarCompiler:
    """vocab_size: of the model, which may have tokens that spell nothing"""
    return GrammarCompiler(tokenizer_json(), vocab_size=vocab_size, eos_token_ids=[EOS])


def make_grammars(vocab_size: int = len(TOKENS)) -> GrammarStates:
    return GrammarStates(lambda: make_compiler(vocab_size))


def text_of(token_ids: list[int]) -> str:
    """What the tokens spell; the end of the text spells nothing."""
    return "".join(TOKENS[token] for token in token_ids if token != EOS)
