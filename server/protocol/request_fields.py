"""The request fields of completions and chat completions: OpenAI's, vLLM's extensions, and ours.

Types are strict ("1" is not 1, but 1.0 is), bounds that no configuration widens stand in the types, and null means
absent. Unknown fields are kept, so that the answer can name them. A body may hold millions of items, of which a report
on each would take minutes: lists and maps that are too long are refused before any item is read, lists fail at their
first wrong item, and what is bounded by the model's vocabulary is checked where that is known
(`server.generation.sampling_params`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.structured_fields import Choices, ResponseFormat, Schema, StructuredOutputs

MAX_TOKEN_ID = 2**31 - 1
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_ID_LENGTH = 128
MAX_VOCABULARY = 2**19  # tokens, more than any model has


def at_most(limit: int) -> BeforeValidator:
    """Refuses a longer list or map at once; pydantic's own `max_length` would look at each of its items first."""

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > limit:
            raise PydanticCustomError("too_long", f"{len(value)} items are more than the {limit} that are allowed")
        return value

    return BeforeValidator(check)


def _as_integer(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_as_integer)]
"""3.0 is 3: some languages have one kind of number only."""

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TOKEN_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
NumLogprobs = Annotated[Whole, Field(ge=0, le=1000)]
RequestIdText = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[A-Za-z0-9._:=+/@-]+$")]
BadWord = Annotated[str, Field(min_length=1, max_length=128)]
NotYet = Annotated[list[None], Field(max_length=0, fail_fast=True)] | None


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="one more chunk at the end, with the usage")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far in every chunk")
    include_obfuscation: Literal[False] | None = Field(None, description="chunks are never padded")


class Speculation(Body):
    enabled: bool | None = Field(None, description="false: no drafts for this request")
    num_drafts: Annotated[Whole, Field(ge=0, le=64)] | None = Field(
        None, description="drafted tokens per step, at most as many as the server is configured for"
    )


class SamplingFields(Body):
    """The sampling fields."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0: the most likely token")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_TOKEN_ID)] | None = Field(None, description="0 or -1: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = Field(
        None, description="over prompt and output; 1: off"
    )
    logit_bias: Annotated[dict[str, object], at_most(MAX_VOCABULARY), WithJsonSchema(BIAS_SCHEMA)] | None = Field(
        None, description="token id to what is added to its logit"
    )
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="the same seed gives the same text, whatever else is running"
    )
    min_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKEN_ID)] | None = Field(
        None, description="nothing stops the output before this many tokens"
    )
    ignore_eos: bool | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True), at_most(16)] | None = Field(
        None, description="text that ends the output; how many may be given is a limit of the server"
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024), at_most(1024)] | None = None
    allowed_token_ids: (
        Annotated[list[object], Field(min_length=1), at_most(MAX_VOCABULARY), WithJsonSchema(TOKEN_IDS_SCHEMA)] | None
    ) = Field(None, description="the only tokens that may be sampled; no more entries than the vocabulary has tokens")
    bad_words: Annotated[list[BadWord], Field(max_length=256, fail_fast=True), at_most(256)] | None = Field(
        None, description="texts that must not be written"
    )
    speculation: Speculation | None = None


class RequestFields(SamplingFields):
    """The fields of both endpoints beyond sampling."""

    model: str
    n: Annotated[Whole, Field(ge=1, le=128)] | None = Field(
        None, description="choices per prompt; limited by the server"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=MAX_TOKEN_ID)] | None = Field(
        None, description="keep so many tokens of a prompt; -1: as many as fit"
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="where tokens beyond truncate_prompt_tokens are cut off; default left: the last ones stay"
    )
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(None, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="cached prefixes are shared only between requests with the same salt"
    )
    request_id: RequestIdText | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds")
    timing: bool | None = Field(None, description="tell where the time went")
    strict: bool | None = Field(None, description="refuse fields that the server does not know")

    # Accepted, because they do not change the text.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, JsonValue] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    response_format: ResponseFormat | None = Field(None, description="what the answer must follow")
    structured_outputs: StructuredOutputs | None = Field(None, description="the same, with more ways to say it")
    guided_json: Schema | str | None = Field(None, description="the older name of structured_outputs.json")
    guided_regex: str | None = Field(None, description="the older name of structured_outputs.regex")
    guided_choice: Choices | None = Field(None, description="the older name of structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="the older name of structured_outputs.grammar")
    guided_whitespace_pattern: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="the older name of structured_outputs.whitespace_pattern"
    )
    guided_decoding_backend: str | None = None  # there is one

    # Refused, because it would change the answer.
    use_beam_search: Literal[False] | None = None


class CompletionBody(RequestFields):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
    ) = Field(
        description="a text, several texts, token ids, or several lists of token ids; a text may be empty where the "
        "model's tokenizer puts a token before it"
    )
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKEN_ID)] | None = Field(
        None, description="default 16; 0 only with echo"
    )
    best_of: Annotated[Whole, Field(ge=1, le=128)] | None = Field(None, description="must be equal to n")
    logprobs: NumLogprobs | None = Field(None, description="log-probabilities of this many most likely tokens, too")
    suffix: Literal[""] | None = Field(None, description="no served model can fill in the middle")


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = None
