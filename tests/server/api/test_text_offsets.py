"""text_offset: where each token begins in the text that the client got, echoed or written, streamed or not."""

from __future__ import annotations

import unicodedata
from functools import cache

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.ipc.messages import TokenizerAssets
from server.text.tokenizer import Tokenizer
from tests.support.server_world import connect, events, make_world

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "é",
    "e\u0301",
    "a\u0323\u0302",
    "你",
    "🙂",
    "👩‍🚀",
    "\n",
    "hello world",
    ".",
    "ﬁ",
    *SPECIAL,
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
TOKEN_IDS = st.lists(st.sampled_from([0, *range(2, 270)]), min_size=1, max_size=8)
RELAXED = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def byte_level(normalizer: object = None, *, trims: bool = False) -> Backend:
    """As GPT-2's, Llama 3's and Qwen's: letters are bytes."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("l", "l"), ("Ġ", "w"), ("ð", "Ł"), ("Ã", "©"), ("e", "Ì"), ("Ġ", "Ġ"), ("h", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    backend.add_special_tokens(SPECIAL)
    return backend


def sentencepiece(*, prepends: bool) -> Backend:
    """As Llama 2's (a blank is put before the text) and Mistral's; what is not in the vocabulary is bytes."""
    words = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "a", "b", "é", "h", "l"]
    merges = [("▁", "a"), ("▁", "b")]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


MAKERS = {
    "bytes": byte_level,
    "composed bytes": lambda: byte_level(normalizers.NFC()),
    "trimmed bytes": lambda: byte_level(trims=True),
    "sentencepiece": lambda: sentencepiece(prepends=False),
    "llama 2": lambda: sentencepiece(prepends=True),
}
everywhere = pytest.mark.parametrize("kind", MAKERS)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    assets = TokenizerAssets(tokenizer_json=MAKERS[kind]().to_str(), chat_template=None, special_tokens={})
    return Tokenizer(assets)


class Worlds:
    """A server for each kind of tokenizer."""

    def __init__(self) -> None:
        self._worlds = {kind: make_world(tokenizer=tokenizer_of(kind)) for kind in MAKERS}

    def __getitem__(self, kind: str):
        return self._worlds[kind]


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return Worlds()


async def ask(world, *, prompt: object = "a", output: list[int] | None = None, stream: bool, **fields) -> dict:
    """The only choice of an answer: its text, and its logprobs."""
    script = output if output is not None else [10]
    world.engine.script = lambda request: script
    body = {"model": "tiny", "prompt": prompt, "logprobs": 0, "max_tokens": len(script), **fields, "stream": stream}
    async with connect(world) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["choices"][0]
    choice = {"text": "", "logprobs": {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}}
    for event in events(response.text):
        (piece,) = event["choices"]
        choice["text"] += piece["text"]
        for key, values in piece["logprobs"].items():
            choice["logprobs"][key] += values
    return choice


def spans(text: str, offsets: list[int]) -> list[str]:
    """The stretches of text between the tokens' beginnings, which must leave nothing out."""
    ends = [*offsets[1:], len(text)]
    assert offsets == sorted(offsets)
    assert not offsets or (offsets[0] == 0 and offsets[-1] <= len(text)), (text, offsets)
    return [text[start:end] for start, end in zip(offsets, ends, strict=True)]


def begin_of_each(pieces: list[bytes]) -> list[int]:
    """Where pieces begin in the text that they are when read one after the other as UTF-8, found the slow way.

    A piece begins at its first byte's character, which is the same one as the byte before it belongs to if cutting the
    bytes between the two makes another text of them.
    """
    whole = b"".join(pieces)
    begins, position = [], 0
    for piece in pieces:
        before, after = (part.decode(errors="replace") for part in (whole[:position], whole[position:]))
        is_inside = before + after != whole.decode(errors="replace")
        begins.append(len(before) - is_inside)
        position += len(piece)
    return begins


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "composed bytes", "trimmed bytes"])
async def test_special_tokens_of_a_prompt_have_their_length(kind: str, stream: bool, worlds) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    choice = await ask(worlds[kind], prompt=prompt, echo=True, max_tokens=0, stream=stream)
    assert choice["text"] == prompt
    starts = dict(zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True))
    assert starts[0] == "<|im_start|>"
    assert starts[19] == "<|im_end|>"
    assert starts[12] == "u"
    assert starts[29] == "\n"


@RELAXED
@everywhere
@given(text=TEXTS.filter(bool), output=st.lists(st.integers(0, 300), min_size=1, max_size=6), stream=st.booleans())
async def test_an_echo_says_where_the_tokens_of_the_prompt_begin_in_it(
    kind: str, text: str, output: list[int], stream: bool, worlds
) -> None:
    world = worlds[kind]
    choice = await ask(world, prompt=text, echo=True, output=output, stream=stream)
    assert choice["text"].startswith(text)
    prompt_ids = world.engine.requests[-1].prompt_token_ids
    offsets = choice["logprobs"]["text_offset"]
    parts = spans(text, offsets[: len(prompt_ids)])
    assert all(offset >= len(text) for offset in offsets[len(prompt_ids) :])
    for token_id, part in zip(prompt_ids, parts, strict=True):
        token = world.tokenizer.token_bytes(token_id).decode(errors="replace")
        if "\ufffd" not in token and not (part == "" and is_added(kind, token)):
            composed = unicodedata.normalize("NFC", part) if kind == "composed bytes" else part
            assert token in (composed, " " + composed)


def is_added(kind: str, token: str) -> bool:
    """It may stand for nothing in the text: the BOS, or the blank that is put first."""
    return kind in ("sentencepiece", "llama 2") and token in ("<s>", " ")


@RELAXED
@everywhere
@given(prompt=TOKEN_IDS, output=TOKEN_IDS, skip=st.booleans(), stream=st.booleans(), step_size=st.integers(1, 5))
async def test_ids_begin_where_their_text_does(
    kind: str, prompt: list[int], output: list[int], skip: bool, stream: bool, step_size: int, worlds
) -> None:
    world = worlds[kind]
    world.engine.step_size = step_size
    choice = await ask(
        world, prompt=prompt, echo=True, output=output, stream=stream, skip_special_tokens=skip, ignore_eos=True
    )
    token_bytes = world.tokenizer.token_bytes
    echoed = [token_bytes(token) for token in prompt]
    written = [b"" if skip and token in world.tokenizer.special_ids else token_bytes(token) for token in output]
    echo = b"".join(echoed).decode(errors="replace")
    blank = len(echo) + len(b"".join(written).decode(errors="replace")) - len(choice["text"])
    assert choice["text"] == echo[blank:] + b"".join(written).decode(errors="replace")
    assert blank == 0 or (kind in ("sentencepiece", "llama 2") and echo.startswith(" "))
    offsets = [max(begin - blank, 0) for begin in begin_of_each(echoed)]
    offsets += [len(echo) - blank + begin for begin in begin_of_each(written)]
    found = choice["logprobs"]["text_offset"]
    spans(choice["text"], found)
    for begin, offset, piece in zip(found, offsets, [*echoed, *written], strict=True):
        assert begin == offset or not piece  # what has no text may lie in the middle of a character


@RELAXED
@everywhere
@given(text=TEXTS, stops=st.lists(st.sampled_from([*PIECES, "🙂b", "b ", " a", "ab"]), min_size=1, max_size=3),
       stream=st.booleans(), step_size=st.integers(1, 5), includes=st.booleans())  # fmt: skip
async def test_no_token_begins_behind_the_text_that_a_stop_string_left(
    kind: str, text: str, stops: list[str], stream: bool, step_size: int, includes: bool, worlds
) -> None:
    world = worlds[kind]
    world.engine.step_size = step_size
    output = [*world.tokenizer.encode(text, add_special_tokens=False), 1]
    fields = {"stop": stops, "include_stop_str_in_output": includes}
    choice = await ask(world, output=output, stream=stream, **fields)
    offsets = choice["logprobs"]["text_offset"]
    spans(choice["text"], offsets)
    assert len(offsets) == len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    whole = await ask(world, output=output, stream=not stream, **fields)
    assert (whole["text"], whole["logprobs"]) == (choice["text"], choice["logprobs"])


@pytest.mark.parametrize("kind", ["sentencepiece", "llama 2"])
async def test_an_echo_of_ids_shows_what_an_echo_of_their_text_shows(kind: str, worlds) -> None:
    world = worlds[kind]
    text = "a b<|im_end|>"
    by_text = await ask(world, prompt=text, echo=True, add_special_tokens=False, stream=False)
    token_ids = world.engine.requests[-1].prompt_token_ids
    for skip in (True, False):
        by_ids = await ask(world, prompt=token_ids, echo=True, skip_special_tokens=skip, stream=False)
        assert by_ids["text"] == by_text["text"]
        assert by_ids["logprobs"]["text_offset"] == by_text["logprobs"]["text_offset"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
async def test_an_empty_prompt_is_taken_where_the_tokenizer_begins_it(kind: str, stream: bool, worlds) -> None:
    world = worlds[kind]
    begins_with_bos = kind in ("sentencepiece", "llama 2")
    for prompt in ("", ["", "a"]):
        async with connect(world) as client:
            response = await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "echo": True})
            assert response.status_code == (200 if begins_with_bos else 400), response.text
            body = {"model": "tiny", "prompt": prompt, "add_special_tokens": False}
            assert (await client.post("/v1/completions", json=body)).status_code == 400
    if begins_with_bos:
        choice = await ask(world, prompt="", echo=True, output=[10], stream=stream)
        assert world.engine.requests[-1].prompt_token_ids == [1]
        assert choice["logprobs"]["text_offset"] == [0, 0]


@everywhere
async def test_a_long_echo_is_placed_beside_the_event_loop(kind: str, worlds) -> None:
    """The same numbers come from the other thread."""
    world = worlds[kind]
    world.engine.model = msgspec.structs.replace(world.engine.model, max_model_len=10_000)
    text = "🙂 a b " * 300
    choice = await ask(world, prompt=text, echo=True, max_tokens=0, stream=False)
    spans(text, choice["logprobs"]["text_offset"])
    assert len(choice["logprobs"]["text_offset"]) > 1000
