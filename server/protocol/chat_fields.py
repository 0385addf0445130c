"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, WithJsonSchema

from server.protocol.request_fields import MAX_TOKEN_ID, Body, NotYet, NumLogprobs, RequestFields, Whole
from server.protocol.tool_fields import MAX_CALLS, EarlierCall, ToolChoice, Tools

MAX_MESSAGES = 2048
PLAIN_SCHEMA = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)]


class InstructionMessage(Body):
    """Of the system, a developer, the user, or whoever else the model's chat template knows."""

    role: Annotated[
        str, Field(min_length=1, max_length=256, json_schema_extra={"not": {"enum": ["assistant", "tool"]}})
    ]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = Field(None, description="what it thought before, if the template shows that again")
    reasoning: str | None = Field(None, description="the same, by another name")
    refusal: str | None = None
    tool_calls: Annotated[list[EarlierCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    function_call: None = None
    audio: None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = Field(None, description="the id of the call whose result this is")
    name: str | None = None


def _kind_of_message(message: object) -> str:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return role if role in ("assistant", "tool") else "instruction"


ChatMessage = Annotated[
    Annotated[InstructionMessage, Tag("instruction")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")],
    Discriminator(_kind_of_message),
]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Variables = Annotated[dict[str, JsonValue], WithJsonSchema(PLAIN_SCHEMA)]


class TokenizeBody(Body):
    """The body of POST /tokenize: one of `prompt`, `content` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = Field(None, description="a conversation, as a chat's prompt would have it")
    add_generation_prompt: bool | None = Field(None, description="default true")
    continue_final_message: bool | None = Field(None, description="go on writing the last message")
    chat_template_kwargs: Variables | None = None
    tools: Tools | None = Field(None, description="functions that are described to the model")
    reasoning_effort: ReasoningEffort | None = Field(None, description="for the chat template")
    add_special_tokens: bool | None = Field(None, description="default true, with messages false")
    return_token_strs: bool | None = Field(None, description="each token's text beside its id")


class ChatBody(RequestFields):
    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)] | None = Field(
        None, description="default: what the context leaves"
    )
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)] | None = Field(
        None, description="the older name of max_completion_tokens, which wins"
    )
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = Field(None, description="only with logprobs")
    add_generation_prompt: bool | None = Field(None, description="default true")
    continue_final_message: bool | None = Field(None, description="go on writing the last message")
    chat_template_kwargs: Variables | None = Field(
        None, description="variables for the chat template; plain values only"
    )

    tools: Tools | None = Field(None, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(
        None, description="auto (the default): as it likes; none; required: at least one; or which"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    include_reasoning: bool | None = Field(None, description="false: reasoning is left out of the answer")
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="for the chat template; none turns thinking off where the template can"
    )
    reasoning_max_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKEN_ID)] | None = Field(
        None, description="after so many tokens of reasoning it is ended, and the answer begins"
    )

    # Refused, because they would change the answer.
    functions: NotYet = None
    function_call: None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    web_search_options: None = None
