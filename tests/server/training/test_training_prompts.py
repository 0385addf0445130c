"""Prompts for training: many, all different, of a seed always the same, through the model's template."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from server.text.tokenizer import Tokenizer
from server.training.chat_prompts import chat_prompts
from server.training.training_prompts import PIECE, own_prompts, read_texts
from tests.support.fake_engine import make_assets


def test_ten_thousand_prompts_are_all_different_and_always_the_same() -> None:
    prompts = list(islice(chat_prompts(0), 10_000))
    assert len({repr(turns) for turns in prompts}) == 10_000
    assert prompts[:100] == list(islice(chat_prompts(0), 100))
    assert prompts[:100] != list(islice(chat_prompts(1), 100))
    assert all(turns[-1]["role"] == "user" for turns in prompts)
    assert not any("{" in turn["content"] for turns in prompts for turn in turns)
    assert {turn["role"] for turns in prompts for turn in turns} == {"system", "user", "assistant"}


def test_prompts_go_through_the_model_s_template() -> None:
    tokenizer = Tokenizer(make_assets())
    prompts = own_prompts(tokenizer, 20, seed=3)
    texts = [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    for text, turns in zip(texts, chat_prompts(3), strict=False):
        assert turns[-1]["content"] in text
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_without_a_template_gets_plain_questions() -> None:
    tokenizer = Tokenizer(make_assets(None))
    [prompt] = own_prompts(tokenizer, 1, seed=3)
    assert tokenizer.decode(prompt) == next(chat_prompts(3))[-1]["content"] + "\n"


def test_texts_are_cut_into_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make_assets())
    file = tmp_path / "text"
    file.write_text("hello world of tokens, the quick brown fox. " * 200)
    pieces = read_texts(tokenizer, file)
    assert [len(piece) for piece in pieces[:-1]] == [PIECE] * (len(pieces) - 1)
    assert tokenizer.decode([token for piece in pieces for token in piece]) == file.read_text()


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make_assets())
    (tmp_path / "latin").write_bytes(b"caf\xe9 ")
    for name in ("latin", "missing"):
        with pytest.raises(ValueError, match=f"--text: .*{name} cannot be read as UTF-8"):
            read_texts(tokenizer, tmp_path / name)
