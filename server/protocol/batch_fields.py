"""The request fields of batches: OpenAI's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.protocol.request_fields import Body, Whole, at_most

MAX_METADATA = 16  # pairs
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class OutputExpiry(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[Whole, Field(ge=3600, le=2592000)]


class BatchBody(Body):
    """The body of POST /v1/batches."""

    input_file_id: Annotated[str, Field(max_length=128)]
    endpoint: Annotated[str, Field(max_length=128)] = Field(description="of all lines, such as /v1/chat/completions")
    completion_window: Literal["24h"]
    metadata: Annotated[dict[MetadataKey, MetadataValue], at_most(MAX_METADATA)] | None = Field(
        None, description="kept with the batch, and shown"
    )
    output_expires_after: OutputExpiry | None = Field(
        None, description="how long the files of its answers are kept, from their creation"
    )
    strict: bool | None = Field(None, description="refuse fields that the server does not know")
