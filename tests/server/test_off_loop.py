"""What a client makes large is worked on beside the event loop, and bounded where that would not help."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.ipc.messages import TokenizerAssets
from server.json_encoding import encode_json
from server.off_loop import off_loop
from server.protocol.chat_fields import ChatBody, TokenizeBody
from server.protocol.request_fields import CompletionBody, DetokenizeBody
from server.text.tokenizer import Tokenizer

MEGABYTE = 1_000_000
WORDS = [
    "hello",
    "world",
    "of",
    "tokens,",
    "quick",
    "brown",
    "naïve",
    "你好",
    "🙂",
    "<|im_end|>",
    "a1b2",
    "2024",
    "\n",
    "  ",
]


@contextmanager
def threads_of(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the threads in which a method is called."""
    seen: set[str] = set()
    method = getattr(owner, name)

    def noted(*arguments: object, **keywords: object) -> object:
        seen.add(threading.current_thread().name)
        return method(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, noted)
        yield seen


def long_text(num_characters: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_characters // 4))[:num_characters]


@pytest.mark.parametrize(
    ("path", "body_type", "body"),
    [
        ("/v1/completions", CompletionBody, {"model": "tiny", "prompt": "hello " * 100_000}),
        ("/v1/completions", CompletionBody, {"model": "tiny", "prompt": "a", "user": "x" * MEGABYTE}),
        (
            "/v1/chat/completions",
            ChatBody,
            {"model": "tiny", "messages": [{"role": "user", "content": "a " * 200_000}]},
        ),
        ("/tokenize", TokenizeBody, {"prompt": "hello " * 100_000}),
        ("/detokenize", DetokenizeBody, {"tokens": [5] * 200_000}),
    ],
)
async def test_large_bodies_are_parsed_off_the_loop(client, monkeypatch, path: str, body_type, body: dict) -> None:
    with threads_of(body_type, "model_validate_json", monkeypatch) as threads:
        response = await client.post(path, json=body)
    assert response.status_code in (200, 400)
    assert threads
    assert all(name.startswith("off-loop") for name in threads)


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"tiny","prompt":[' + ",".join(["5"] * 20_000) + "]}",
        '{"model":"tiny","prompt":"a","metadata":{' + ",".join(f'"{i}":"1"' for i in range(10_000)) + "}}",
        '{"model":"tiny","prompt":"a","x":[' + ",".join(["[]"] * 20_000) + "]}",
    ],
)
async def test_small_bodies_of_many_values_are_parsed_off_the_loop(client, monkeypatch, body: str) -> None:
    with threads_of(CompletionBody, "model_validate_json", monkeypatch) as threads:
        await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert threads
    assert all(name.startswith("off-loop") for name in threads)


async def test_text_full_of_commas_is_no_body_of_many_values(client) -> None:
    body = {"model": "tiny", "prompt": "a", "user": ',:[{"' * 200_000}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


@pytest.mark.parametrize("size", ["small", "large"])
async def test_texts_and_ids_are_read_off_the_loop_where_they_are_long(world, client, monkeypatch, size: str) -> None:
    number = 2 if size == "small" else 40_000
    tokenizer = world.tokenizer
    monkeypatch.setattr(tokenizer, "max_token_characters", 10_000)  # so that length alone refuses none
    bodies = [
        ("/tokenize", {"prompt": "hello " * number}),
        ("/detokenize", {"tokens": [5] * number}),
        ("/v1/completions", {"model": "tiny", "prompt": "hello " * number}),
        ("/v1/completions", {"model": "tiny", "prompt": "hello " * number, "truncate_prompt_tokens": 5}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hello " * number}]}),
    ]
    for path, body in bodies:
        with (
            threads_of(tokenizer, "encode", monkeypatch) as encoding,
            threads_of(tokenizer, "decode", monkeypatch) as decoding,
        ):
            assert (await client.post(path, json=body)).status_code in (200, 400)
        threads = encoding | decoding
        assert threads, path
        assert all(name.startswith("off-loop") == (size == "large") for name in threads), path


LARGE_VALUES: list[tuple[str, Callable[[], str]]] = [
    ("/v1/completions", lambda: '{"model":"tiny","prompt":"a",' + ",".join(f'"f{i}":1' for i in range(100_000)) + "}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":[' + ",".join(["5"] * 300_000) + "]}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":"a","stop":[' + ",".join(['"x"'] * 300_000) + "]}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":"a","x":' + "[" * 300_000 + "]" * 300_000 + "}"),
    (
        "/v1/completions",
        lambda: '{"model":"tiny","prompt":"a","metadata":{' + ",".join(f'"{i}":"1"' for i in range(100_000)) + "}}",
    ),
    (
        "/v1/chat/completions",
        lambda: '{"model":"tiny","messages":[' + ",".join(['{"role":"user","content":"a"}'] * 60_000) + "]}",
    ),
    ("/detokenize", lambda: '{"tokens":[' + ",".join(["5"] * 300_000) + "]}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":"a","stop":[' + ",".join(["[]"] * 40_000) + "]}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":[' + ",".join(["[5]"] * 40_000) + "]}"),
    ("/v1/completions", lambda: '{"model":"tiny","prompt":"a","x":[' + ",".join(["{}"] * 40_000) + "]}"),
]


@pytest.mark.parametrize(("path", "make_body"), LARGE_VALUES)
async def test_bodies_of_very_many_values_are_refused_before_they_are_parsed(
    client, monkeypatch, path: str, make_body: Callable[[], str]
) -> None:
    bodies = [CompletionBody, ChatBody, DetokenizeBody]
    body_type = next(one for one in bodies if one.__name__.lower()[:4] in path.replace("/", ""))
    with threads_of(body_type, "model_validate_json", monkeypatch) as threads:
        response = await client.post(path, content=make_body(), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "limits.max_body_values" in message
    assert any(character.isdigit() for character in message)
    assert not threads


async def test_tokenize_has_a_limit_of_its_own_in_bytes(world, client) -> None:
    limit = world.state.config.limits.max_tokenize_bytes
    response = await client.post("/tokenize", json={"content": "é" * (limit // 2 + 1)})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "content"
    assert str(limit) in response.json()["error"]["message"]
    assert (await client.post("/tokenize", json={"content": "a" * limit})).status_code == 200


@pytest.mark.parametrize(
    "cut",
    [{}, {"truncate_prompt_tokens": 2**31 - 1}, {"truncate_prompt_tokens": 2**31 - 1, "truncation_side": "right"}],
)
async def test_a_text_far_beyond_the_context_is_read_as_far_as_that_takes(world, client, monkeypatch, cut) -> None:
    lengths: list[int] = []
    encode = world.tokenizer.encode
    monkeypatch.setattr(
        world.tokenizer, "encode", lambda text, **options: lengths.append(len(text)) or encode(text, **options)
    )
    monkeypatch.setattr(world.tokenizer, "max_token_characters", 1000)  # as in vocabularies that have long blanks
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": long_text(200_000), **cut})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "at least 257 tokens" in response.json()["error"]["message"]
    assert max(lengths) < 20_000


def make_tokenizers() -> dict[str, Tokenizer]:
    """Of the kinds that there are: bytes split by a pattern, blanks as a letter without any split, normalised text."""
    tokenizers = {}
    for kind in ("byte level", "sentencepiece", "composed"):
        backend = Backend(models.BPE(unk_token="<unk>" if kind == "sentencepiece" else None))
        specials = ["<unk>", "<s>", "<|im_end|>"]
        if kind == "sentencepiece":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        else:
            backend.normalizer = normalizers.NFC() if kind == "composed" else None
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind != "sentencepiece" else [],
            special_tokens=specials,
            show_progress=False,
            max_token_length=12,
        )
        backend.train_from_iterator([long_text(3000, seed) for seed in range(3)], trainer)
        assets = TokenizerAssets(tokenizer_json=backend.to_str(), chat_template=None, special_tokens={})
        tokenizers[kind] = Tokenizer(assets)
    return tokenizers


TOKENIZERS = make_tokenizers()


@pytest.mark.parametrize("from_end", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_of_one_end_are_those_of_the_whole_text(kind: str, from_end: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    num_cut = 0
    for seed in range(60):
        rng = random.Random(seed)
        text = long_text(rng.randrange(20_000), seed)
        if seed % 3 == 0:
            text = text.replace(" ", "e\u0301 " if seed % 2 else " " * rng.randrange(1, 5))
        number = rng.randrange(1, 400)
        whole = tokenizer.encode(text, add_special_tokens=True)
        ids, is_whole = tokenizer.encode_part(text, number, add_special_tokens=True, from_end=from_end)
        num_cut += not is_whole
        expected = whole if is_whole else whole[-number:] if from_end else whole[:number]
        assert ids == expected
        assert is_whole or len(whole) >= number
    assert num_cut > 20


def test_a_text_without_words_is_cut_all_the_same() -> None:
    ids, is_whole = TOKENIZERS["byte level"].encode_part("x" * 300_000, 10, add_special_tokens=True, from_end=True)
    assert not is_whole
    assert len(ids) == 10


class Inner(msgspec.Struct):
    numbers: list[int]
    names: list[str | None] | msgspec.UnsetType = msgspec.UNSET


class Outer(msgspec.Struct, omit_defaults=True):
    parts: list[Inner]
    first: Inner
    by_token: list[dict[str, float] | None]


@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 10_000])
def test_answers_are_encoded_in_pieces_as_they_would_be_at_once(length: int) -> None:
    numbers = list(range(length))
    names = [None if i % 3 else 'é"\\' for i in numbers]
    outer = Outer([Inner(numbers, names), Inner([1])], Inner(numbers), [{"a": 0.5}, None] * length)
    expected = json.loads(msgspec.json.encode(outer))
    assert json.loads(encode_json(outer)) == expected


@pytest.mark.parametrize("stream", [True, False])
async def test_scores_of_a_long_prompt_are_put_into_words_off_the_loop(world, client, monkeypatch, stream) -> None:
    from server.generation import streaming

    monkeypatch.setattr(streaming, "LARGE_DELTA", 20)
    body = {"model": "tiny", "prompt": [5] * 30, "max_tokens": 1, "echo": True, "logprobs": 2, "stream": stream}
    with threads_of(streaming, "encode_json", monkeypatch) as threads:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert threads
    assert all(name.startswith("off-loop") for name in threads)


async def test_the_sum_of_what_a_request_has_decides_where_it_is_read(world, client, monkeypatch) -> None:
    """Sixty-four prompts, or two hundred bad words, are each short."""
    bodies = [
        {"model": "tiny", "prompt": ["hello world " * 4] * 64},
        {"model": "tiny", "prompt": "a", "bad_words": [f"hello world {i}" for i in range(200)]},
        {"model": "tiny", "prompt": ["hello world " * 4] * 64, "echo": True, "max_tokens": 1},
    ]
    for body in bodies:
        with (
            threads_of(world.tokenizer, "encode", monkeypatch) as one,
            threads_of(world.tokenizer, "encode_all", monkeypatch) as all_at_once,
            threads_of(world.tokenizer, "token_spans", monkeypatch) as spans,
        ):
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert [name for name in one | all_at_once if name.startswith("off-loop")], body
        if len(body["prompt"]) > 1:
            assert all(name.startswith("off-loop") for name in one | spans), body


async def test_stop_strings_are_prepared_once_for_all_choices(client, monkeypatch) -> None:
    from server.text import stop_strings

    prepared: list[str] = []
    borders = stop_strings._borders
    monkeypatch.setattr(stop_strings, "_borders", lambda string: prepared.append(string) or borders(string))
    stops = ["a" * 1000 + str(i) for i in range(16)]
    body = {"model": "tiny", "prompt": ["a", "b"], "n": 20, "stop": stops, "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert sorted(prepared) == sorted(stops)


async def test_choices_times_parameters_are_bounded(world, client) -> None:
    words = [f"hello {i} " + "x" * 80 for i in range(200)]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "bad_words": words, "n": 2}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    response = await client.post("/v1/completions", json={**body, "n": 128})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "128 choices" in message
    assert "bad_words" in message
    assert len(world.engine.requests) == 2


async def test_python_works_in_one_thread_so_that_the_loop_has_its_turn() -> None:
    """Each thread that waits for the interpreter's lock may have it before the event loop does."""
    names = await asyncio.gather(*(off_loop(lambda: threading.current_thread().name) for _ in range(20)))
    assert len(set(names)) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_long_prompts_are_repeated_off_the_loop(world, client, monkeypatch, stream) -> None:
    from server.generation import streaming

    monkeypatch.setattr(streaming, "LARGE_DELTA", 20)
    body = {"model": "tiny", "prompt": "hello " * 20, "n": 128, "max_tokens": 1, "echo": True, "stream": stream}
    with threads_of(streaming, "encode_json", monkeypatch) as threads:
        response = await client.post("/v1/completions", json=body | {"n": 1 if stream else 128})
    assert response.status_code == 200
    assert bool(threads) == (not stream)  # one choice is short, all of them are long
    assert all(name.startswith("off-loop") for name in threads)


@pytest.mark.parametrize("field", ["stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids"])
async def test_a_list_that_is_too_long_is_named_as_the_client_names_it(client, field: str) -> None:
    items = {str(i): 1 for i in range(3000)} if field == "logit_bias" else ["x"] * 3000
    items = [5] * 3000 if field.endswith("ids") else items
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", field: items})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: 3000 ")


async def test_a_server_that_is_ready_never_again_looks_through_what_it_imported(world) -> None:
    from server.cli.serve import _announce

    class Silent:
        def banner(self, *_: object) -> None:
            """Nobody reads it."""

    gc.unfreeze()
    world.state.first_ready.set()
    try:
        await _announce(world.state, Silent(), "http://127.0.0.1")
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
