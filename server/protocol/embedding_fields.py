"""The bodies of requests for embeddings, scores and rankings, and their replies."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import Field

from server.protocol.request_fields import MAX_TOKEN_ID, Body, RequestIdText, TokenIds, Whole

MAX_DIMENSIONS = 2**20


class PoolingFields(Body):
    """What the three endpoints share."""

    model: str
    pooling: Literal["last", "mean"] | None = Field(
        None, description="of the hidden states: that of the last token, or the mean of all; default: as the model says"
    )
    add_special_tokens: bool | None = Field(None, description="default true")
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=MAX_TOKEN_ID)] | None = Field(
        None, description="keep so many tokens of a text; -1: as many as fit"
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="where tokens beyond truncate_prompt_tokens are cut off; default left: the last ones stay"
    )
    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(None, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: RequestIdText | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds")
    strict: bool | None = Field(None, description="refuse fields that the server does not know")
    user: str | None = None


class EmbeddingBody(PoolingFields):
    """The body of POST /v1/embeddings."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
    ) = Field(description="a text, several texts, token ids, or several lists of token ids")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="numbers, the default, or little-endian float32 in base64"
    )
    dimensions: Annotated[Whole, Field(ge=1, le=MAX_DIMENSIONS)] | None = Field(
        None, description="keep so many of the first dimensions"
    )
    normalize: bool | None = Field(None, description="scale to length 1, default true")


Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class ScoreBody(PoolingFields):
    """The body of POST /v1/score: text_1 and text_2, pair by pair, or one text_1 with each text_2."""

    text_1: Texts
    text_2: Texts


class Document(Body):
    text: Text


class RerankBody(PoolingFields):
    """The body of POST /v1/rerank."""

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[Whole, Field(ge=0, le=MAX_TOKEN_ID)] | None = Field(None, description="0, the default: all")
    return_documents: bool | None = Field(None, description="default true")


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Score(msgspec.Struct, kw_only=True):
    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreList(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage


class RankedDocument(msgspec.Struct):
    text: str


class Rank(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: RankedDocument | None = None


class Ranking(msgspec.Struct, kw_only=True):
    id: str
    model: str
    usage: EmbeddingUsage
    results: list[Rank]
