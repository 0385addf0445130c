"""/v1/embeddings, /v1/score and /v1/rerank: from vectors of the engine to what clients read."""

from __future__ import annotations

import base64
import math
import struct

import pytest

PATH = "/v1/embeddings"


async def ask(client, path: str = PATH, **fields) -> dict:
    response = await client.post(path, json={"model": "tiny"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_vectors_come_in_the_order_of_the_texts_scaled_to_length_one(world, client) -> None:
    answer = await ask(client, input=["hello", "hello world", "x"], pooling="mean")
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    asked = world.engine.requests
    assert [request.pooling for request in asked] == ["mean"] * 3
    for one, request in zip(answer["data"], asked, strict=True):
        raw = [len(request.prompt_token_ids), request.prompt_token_ids[-1], 1, 2]
        length = math.sqrt(sum(value * value for value in raw))
        assert one["embedding"] == pytest.approx([value / length for value in raw], rel=1e-6)
    num_tokens = sum(len(request.prompt_token_ids) for request in asked)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert world.metrics.outcomes == ["stop"]
    assert world.metrics.num_tokens == 0


async def test_a_vector_is_the_same_in_base64_and_in_numbers(client) -> None:
    [numbers] = (await ask(client, input="hello", normalize=False))["data"]
    [encoded] = (await ask(client, input="hello", normalize=False, encoding_format="base64"))["data"]
    assert list(struct.unpack("<4f", base64.b64decode(encoded["embedding"]))) == numbers["embedding"]


async def test_fewer_dimensions_have_length_one_again(client) -> None:
    [one] = (await ask(client, input="hello", dimensions=2))["data"]
    assert math.hypot(*one["embedding"]) == pytest.approx(1)
    assert len(one["embedding"]) == 2


async def test_token_ids_are_taken_as_they_are(world, client) -> None:
    await ask(client, input=[[5, 6, 7], [8]])
    await ask(client, input=[9, 10])
    assert [request.prompt_token_ids for request in world.engine.requests] == [[5, 6, 7], [8], [9, 10]]
    assert world.engine.requests[0].pooling == "last"


async def test_a_text_may_fill_the_context(world, client) -> None:
    await ask(client, input=[[5] * 256])
    response = await client.post(PATH, json={"model": "tiny", "input": [[5] * 257]})
    assert response.status_code == 400
    assert "257" in response.json()["error"]["message"]
    await ask(client, input=[[5] * 256 + [6]], truncate_prompt_tokens=-1)
    assert world.engine.requests[-1].prompt_token_ids == [5] * 255 + [6]


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (PATH, {}, "input"),
        (PATH, {"input": []}, "input"),
        (PATH, {"input": ""}, "empty"),
        (PATH, {"input": ["a", ""]}, "empty"),
        (PATH, {"input": ["a", 5]}, "input"),
        (PATH, {"input": [400]}, "vocabulary"),
        (PATH, {"input": "a", "dimensions": 5}, "dimensions"),
        (PATH, {"input": "a", "dimensions": 0}, "dimensions"),
        (PATH, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (PATH, {"input": ["a"] * 1025}, "limits.max_embedding_inputs"),
        (PATH, {"input": "a", "unheard": 1, "strict": True}, "unheard"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents"),
    ],
)
async def test_what_makes_no_vector_is_refused_by_its_name(world, client, path, fields, named) -> None:
    response = await client.post(path, json={"model": "tiny"} | fields)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]
    assert world.metrics.outcomes == ["invalid"]


async def test_a_text_that_fails_fails_the_request(world, client) -> None:
    world.engine.fail_after = 0
    response = await client.post(PATH, json={"model": "tiny", "input": ["a", "b"]})
    assert response.status_code == 500
    assert world.metrics.outcomes == ["error"]


async def test_scores_are_cosines_of_pairs_or_of_one_with_each(client) -> None:
    [same] = (await ask(client, "/v1/score", text_1="hello", text_2="hello"))["data"]
    assert same["score"] == pytest.approx(1)
    many = await ask(client, "/v1/score", text_1="hello", text_2=["hello", "x y z"])
    assert many["data"][0]["score"] == pytest.approx(1)
    assert many["data"][1]["score"] < 1
    pairs = await ask(client, "/v1/score", text_1=["x", "y"], text_2=["x", "y"])
    assert [one["score"] for one in pairs["data"]] == pytest.approx([1, 1])


async def test_documents_are_ranked_the_likest_first(client) -> None:
    documents = ["some other text", {"text": "hello"}, "x"]
    answer = await ask(client, "/v1/rerank", query="hello", documents=documents)
    scores = [one["relevance_score"] for one in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["results"][0] == {"index": 1, "relevance_score": pytest.approx(1), "document": {"text": "hello"}}
    short = await ask(client, "/v1/rerank", query="hello", documents=documents, top_n=1, return_documents=False)
    assert short["results"] == [{"index": 1, "relevance_score": pytest.approx(1)}]
