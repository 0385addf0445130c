"""Text from token ids as they come: nothing lost, nothing cut, no stop string shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.ipc.messages import TokenizerAssets
from server.text.detokenizer import Detokenizer, TextOptions
from server.text.stop_strings import StopSearch, StopStrings
from server.text.tokenizer import Tokenizer

TEXTS = st.text(alphabet="ab hé你🙂👩‍🚀\n\u0301", max_size=40)
STOPS = st.lists(st.text(alphabet="ab h🙂é", min_size=1, max_size=4), min_size=1, max_size=4)


def run(tokenizer: Tokenizer, token_ids: list[int], *, stop=(), **options) -> tuple[list[str], Detokenizer]:
    """The pieces, one per token and one of the flush."""
    detokenizer = Detokenizer(tokenizer, TextOptions(stop=StopStrings(stop), **options))
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.matched_stop is not None:
            return pieces, detokenizer
    return [*pieces, detokenizer.flush()], detokenizer


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Spaces as in SentencePiece, and bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "a", "b", "▁", "é"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(TokenizerAssets(tokenizer_json=backend.to_str(), chat_template=None, special_tokens={}))


@given(TEXTS)
def test_a_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    pieces, _ = run(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 340), max_size=30), st.booleans())
def test_the_pieces_of_any_tokens_are_the_whole_decoded_at_once(
    tokenizer: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    pieces, detokenizer = run(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert detokenizer.num_characters == sum(map(len, pieces))


@given(st.text(max_size=20))
def test_a_character_is_never_cut_in_two(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces, _ = run(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    first_byte = next(i for i in range(340) if tokenizer.token_bytes(i) == b"\xf0")
    assert run(tokenizer, [first_byte])[0] == ["", "\ufffd"]


@given(st.text(alphabet="ab é🙂", max_size=20))
def test_byte_fallback_joins_bytes_to_characters(sentencepiece: Tokenizer, text: str) -> None:
    token_ids = sentencepiece.encode(text, add_special_tokens=False)
    pieces, _ = run(sentencepiece, token_ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_at_the_beginning_of_the_output_is_kept(sentencepiece: Tokenizer) -> None:
    word = next(i for i in range(300) if sentencepiece.token_bytes(i) == b" a")
    assert run(sentencepiece, [word, word])[0] == [" a", " a", ""]


@given(text=TEXTS, stops=STOPS)
def test_what_a_stop_string_leaves_is_the_text_before_the_first_one_that_ends(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    pieces, detokenizer = run(tokenizer, tokenizer.encode(text, add_special_tokens=False), stop=tuple(stops))
    ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert "".join(pieces) == text
        assert detokenizer.matched_stop is None
        return
    end = min(ends)
    longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
    assert detokenizer.matched_stop == longest
    assert "".join(pieces) == text[: end - len(longest)]


@given(text=TEXTS, stops=STOPS)
def test_no_piece_ever_shows_part_of_a_stop_string_that_comes(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    pieces, detokenizer = run(tokenizer, tokenizer.encode(text, add_special_tokens=False), stop=tuple(stops))
    shown = "".join(pieces)
    if detokenizer.matched_stop is not None:
        assert not any(stop in shown for stop in stops)


@given(text=TEXTS, stops=STOPS)
def test_included_stop_strings_end_the_text(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    without, first = run(tokenizer, token_ids, stop=tuple(stops))
    with_stop, _ = run(tokenizer, token_ids, stop=tuple(stops), include_stop=True)
    assert "".join(with_stop) == "".join(without) + (first.matched_stop or "")


@given(text=TEXTS, stops=STOPS, min_tokens=st.integers(0, 30))
def test_stop_strings_do_not_count_before_min_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, detokenizer = run(tokenizer, token_ids, stop=tuple(stops), min_tokens=min_tokens)
    if detokenizer.matched_stop is None:
        assert "".join(pieces) == text
    else:
        assert detokenizer.num_tokens >= min_tokens
        assert text.startswith("".join(pieces) + detokenizer.matched_stop)


def test_text_that_turns_out_to_be_no_stop_string_is_released(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, tokenizer.encode("xhelx", add_special_tokens=False), stop=("hello",))
    assert "".join(pieces) == "xhelx"
    assert "".join(pieces[:-2]) == "x"


def test_skipped_special_tokens_leave_no_trace_and_shown_ones_do(tokenizer: Tokenizer) -> None:
    a = tokenizer.encode("a", add_special_tokens=False)
    assert "".join(run(tokenizer, [*a, 1, *a])[0]) == "aa"
    assert "".join(run(tokenizer, [*a, 1, *a], skip_special_tokens=False)[0]) == "a</s>a"


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(TokenizerAssets(tokenizer_json=backend.to_str(), chat_template=None, special_tokens={}))
    options = {"skip_special_tokens": False}
    assert "".join(run(tokenizer, [2, 0, 1, 2], **options)[0]) == " a <s> </s> a"
    options["spaces_between_special_tokens"] = False
    assert "".join(run(tokenizer, [2, 0, 1, 2], **options)[0]) == " a <s></s> a"


@settings(max_examples=200)
@given(text=st.text(alphabet="ab", max_size=60), strings=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_the_automaton_finds_what_a_search_finds(text: str, strings: list[str]) -> None:
    stops = StopSearch(StopStrings(strings))
    for end, character in enumerate(text, start=1):
        expected = max((s for s in strings if text[:end].endswith(s)), key=len, default=None)
        assert stops.advance(character) == expected
        tails = [n for s in strings for n in range(1, len(s)) if text[:end].endswith(s[:n])]
        assert stops.num_held == max(tails, default=0)


def test_the_tokens_of_a_chat_are_named_by_their_bytes(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("你🙂", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "你🙂".encode()
    assert tokenizer.token_text(1) == "</s>"
    assert json.dumps([tokenizer.token_text(i) for i in range(400)])
