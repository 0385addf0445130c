"""POST /v1/embeddings, and what falls out of it: /v1/score and /v1/rerank by the cosine of two embeddings."""

from __future__ import annotations

import base64
import importlib
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from engine.ipc.messages import ModelInfo
from engine.types import SamplingParams
from server.api.admit_request import Reading, Serving, accept, make_generation, make_record
from server.errors import bad_request
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.generation.prompts import PromptOptions, read_prompts, split_prompts
from server.generation.sampling_params import check_num_inputs
from server.generation.streaming import deliver
from server.off_loop import off_lock
from server.protocol.body import ignored_fields, read_body
from server.protocol.embedding_fields import (
    Embedding,
    EmbeddingBody,
    EmbeddingList,
    EmbeddingUsage,
    PoolingFields,
    Rank,
    RankedDocument,
    Ranking,
    RerankBody,
    Score,
    ScoreBody,
    ScoreList,
)
from server.protocol.openapi import replies, request_body
from server.protocol.request_fields import RequestFields
from server.telemetry.request_record import RequestRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

router = APIRouter()
PARAMS = SamplingParams(seed=0, max_tokens=1)  # nothing is sampled


@router.post(
    "/v1/embeddings",
    response_model=None,
    responses=replies(EmbeddingList),
    openapi_extra=request_body(EmbeddingBody),
)
async def create_embeddings(request: Request) -> Response:
    """A vector for each text: the model's last hidden states, pooled."""
    with make_record(request) as record:
        body = await read_body(request, EmbeddingBody)
        serving = _accept(request, body, record)
        check_dimensions(body.dimensions, serving.model)
        inputs = split_prompts(body.input)
        generation = await _prepare(body, inputs, serving, record, param="input")
        writer = EmbeddingWriter(body, generation)
        return await deliver(request, generation, writer, headers=serving.headers)


@router.post("/v1/score", response_model=None, responses=replies(ScoreList), openapi_extra=request_body(ScoreBody))
async def score_texts(request: Request) -> Response:
    """How alike texts are: the cosine of the embeddings of two, from -1 to 1."""
    with make_record(request) as record:
        body = await read_body(request, ScoreBody)
        serving = _accept(request, body, record)
        firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(firsts) not in (1, len(seconds)):
            raise bad_request(
                f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; send as many of both, or one text_1",
                param="text_1",
            )
        generation = await _prepare(body, [*firsts, *seconds], serving, record, param="text_2")
        writer = ScoreWriter(generation, num_firsts=len(firsts))
        return await deliver(request, generation, writer, headers=serving.headers)


@router.post("/v1/rerank", response_model=None, responses=replies(Ranking), openapi_extra=request_body(RerankBody))
async def rerank_documents(request: Request) -> Response:
    """Documents in the order in which they are like a query, by the cosine of their embeddings."""
    with make_record(request) as record:
        body = await read_body(request, RerankBody)
        serving = _accept(request, body, record)
        documents = [each if isinstance(each, str) else each.text for each in body.documents]
        generation = await _prepare(body, [body.query, *documents], serving, record, param="documents")
        writer = RankingWriter(body, documents, generation)
        return await deliver(request, generation, writer, headers=serving.headers)


def check_dimensions(dimensions: int | None, model: ModelInfo) -> None:
    if dimensions is not None and dimensions > model.hidden_size:
        raise bad_request(
            f"dimensions is {dimensions}, but the model's vectors have {model.hidden_size}", param="dimensions"
        )


def _accept(request: Request, body: PoolingFields, record: RequestRecord) -> Serving:
    shared = {name: getattr(body, name) for name in PoolingFields.model_fields if name in RequestFields.model_fields}
    fields = RequestFields.model_validate(shared)
    return accept(request, fields, arrived_at=record.started_at, ignored=ignored_fields(body))


async def _prepare(
    body: PoolingFields, inputs: list[str] | list[str | list[int]], serving: Serving, record: RequestRecord, *,
    param: str,
) -> Generation:  # fmt: skip
    check_num_inputs(len(inputs), serving.state.config, param=param)
    options = PromptOptions(
        max_tokens=None,
        add_special_tokens=body.add_special_tokens is not False,
        truncate_to=body.truncate_prompt_tokens,
        keeps_beginning=body.truncation_side == "right",
        param=param,
        samples=False,
    )
    prompts = await read_prompts(inputs, options, tokenizer=serving.tokenizer, model=serving.model)
    await off_lock(importlib.import_module, "numpy")  # a tenth of a second, once
    fields = RequestFields.model_validate({"model": body.model, "priority": body.priority})
    return make_generation(
        serving,
        fields,
        prompts,
        PARAMS,
        id_prefix="embd-",
        record=record,
        reading=Reading(pooling=body.pooling or serving.model.pooling),
    )


def _vectors(deltas: list[Delta]) -> NDArray[np.float32]:
    """[number of texts, hidden_size]"""
    import numpy as np

    return np.stack([np.frombuffer(delta.pooled or b"", dtype="<f4") for delta in deltas])


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each of length 1; one without any length stays as it is."""
    import numpy as np

    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    scaled: NDArray[np.float32] = (wide / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return scaled


def _cosines(firsts: NDArray[np.float32], seconds: NDArray[np.float32]) -> list[float]:
    """Of pairs, or of one with each."""
    cosines: list[float] = (_normalised(firsts) * _normalised(seconds)).sum(axis=1, dtype="f8").tolist()
    return [max(min(cosine, 1.0), -1.0) for cosine in cosines]


def _usage(generation: Generation) -> EmbeddingUsage:
    num_tokens = generation.counts().num_prompt_tokens
    return EmbeddingUsage(num_tokens, num_tokens)


class EmbeddingWriter:
    """Formats vectors as OpenAI's embeddings."""

    def __init__(self, body: EmbeddingBody, generation: Generation) -> None:
        self._body, self._generation = body, generation

    def reply(self, choices: list[Delta]) -> EmbeddingList:
        vectors = _vectors(choices)[:, : self._body.dimensions]
        if self._body.normalize is not False:
            vectors = _normalised(vectors)
        job = self._generation.job
        return EmbeddingList(
            id=job.response_id,
            created=job.created,
            model=job.model,
            data=[Embedding(index=index, embedding=self._worded(vector)) for index, vector in enumerate(vectors)],
            usage=_usage(self._generation),
        )

    def _worded(self, vector: NDArray[np.float32]) -> list[float] | str:
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


class ScoreWriter:
    """Formats cosines as scores. num_firsts: of the texts, the first ones, each of which is one of a pair, or one"""

    def __init__(self, generation: Generation, *, num_firsts: int) -> None:
        self._generation, self._num_firsts = generation, num_firsts

    def reply(self, choices: list[Delta]) -> ScoreList:
        vectors, job = _vectors(choices), self._generation.job
        cosines = _cosines(vectors[: self._num_firsts], vectors[self._num_firsts :])
        return ScoreList(
            id=job.response_id,
            created=job.created,
            model=job.model,
            data=[Score(index=index, score=cosine) for index, cosine in enumerate(cosines)],
            usage=_usage(self._generation),
        )


class RankingWriter:
    """Formats documents with their cosines, the likest first."""

    def __init__(self, body: RerankBody, documents: list[str], generation: Generation) -> None:
        self._body, self._documents, self._generation = body, documents, generation

    def reply(self, choices: list[Delta]) -> Ranking:
        vectors, job = _vectors(choices), self._generation.job
        cosines = _cosines(vectors[:1], vectors[1:])
        order = sorted(range(len(cosines)), key=lambda index: -cosines[index])
        shows = self._body.return_documents is not False
        results = [
            Rank(
                index=index,
                relevance_score=cosines[index],
                document=RankedDocument(self._documents[index]) if shows else None,
            )
            for index in order[: self._body.top_n or None]
        ]
        return Ranking(id=job.response_id, model=job.model, usage=_usage(self._generation), results=results)
