"""Tokenizers in GGUF headers, compared with those that transformers builds from the same vocabulary."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from engine.loading.gguf.header import GGUFHeader, read_gguf_header
from engine.loading.gguf.vocabulary import SPLITTINGS, gguf_tokenizer
from engine.models.model_error import ModelError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "1 2", "l l", "' s"]


def vocabulary() -> list[str]:
    return SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


def write_byte_level(path: Path, pre: str, merges: list[str] = MERGES) -> GGUFHeader:
    writer = gguf.GGUFWriter(path, "llama")
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return finish(writer, path)


def write_sentencepiece(path: Path, pieces: list[str], scores: list[float], kinds: list[int]) -> GGUFHeader:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> GGUFHeader:
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_header(path)


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_text_survives_the_tokenizer_of_every_splitting(tmp_path: Path, pre: str) -> None:
    header = write_byte_level(tmp_path / "m.gguf", pre)
    tokenizer = Tokenizer.from_str(gguf_tokenizer(header).tokenizer_json)
    for text in random_texts(40):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == (nfc(text) if SPLITTINGS[pre].composes else text)
    has_bos = tokenizer.encode("a").ids[0] == 1
    assert has_bos == SPLITTINGS[pre].adds_bos


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    parts = ["the", " the", " ", "\n", "\t", "é", "e\u0301", "漢字", "🙂", "<|im_end|>", "'s", "'LL", "12", "345"]
    parts += ["!!", "\r\n", "_"]
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(count)]


def test_qwen2_text_becomes_the_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    header = write_byte_level(tmp_path / "m.gguf", "qwen2")
    ours = Tokenizer.from_str(gguf_tokenizer(header).tokenizer_json)
    vocab = {token: index for index, token in enumerate(vocabulary())}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES])
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
    for text in random_texts(200):
        assert ours.encode(text).ids == theirs(text).input_ids, text


def test_digits_are_split_before_spaces_join_them(tmp_path: Path) -> None:
    header = write_byte_level(tmp_path / "m.gguf", "smollm")
    tokenizer = Tokenizer.from_str(gguf_tokenizer(header).tokenizer_json)
    assert tokenizer.encode("in  12").tokens == ["in", "ĠĠ", "1", "2"]


def test_sentencepiece_text_becomes_the_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    words = ["th", "he", "in", "▁t", "▁the", "ing", "▁th", "▁in", "er", "▁▁"]
    characters = [*"abcdefghinorst", "▁", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *characters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(characters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(characters))]
    header = write_sentencepiece(tmp_path / "m.gguf", pieces, scores, kinds)
    ours = Tokenizer.from_str(gguf_tokenizer(header).tokenizer_json)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [(p[:i], p[i:]) for p in words for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    theirs = LlamaTokenizer(vocab=vocab, merges=merges)
    rng = random.Random(1)
    for _ in range(200):
        text = "x" + "".join(rng.choices([*"abcdehinrst", " the", "  ", "é", "漢", "🙂", "\n"], k=rng.randrange(20)))
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.encode(text).ids == [1, *ids]
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("merges", "pre", "reason"),
    [
        (MERGES, "unheard-of", r"'unheard-of'.*model\.tokenizer"),
        ([*MERGES, "no such"], "smollm", "cannot be built"),
        ([*MERGES, "nonsense"], "smollm", "cannot be built"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_a_model_error(
    tmp_path: Path, merges: list[str], pre: str, reason: str
) -> None:
    header = write_byte_level(tmp_path / "m.gguf", pre, merges)
    with pytest.raises(ModelError, match=reason):
        gguf_tokenizer(header)
