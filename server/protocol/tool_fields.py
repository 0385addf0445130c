"""The tools of a chat: which functions there are, which may or must be called, and the calls of earlier turns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from server.protocol.request_fields import Body, at_most

MAX_TOOLS = 1024  # the server's own limit is below
MAX_CALLS = 1024  # of one message
MAX_ARGUMENTS_LENGTH = 1 << 20  # characters
ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class FunctionSpec(Body):
    name: ToolName = Field(description="letters, digits, _, - and .; no two tools have the same")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(None, description="a JSON Schema of the object of arguments")
    strict: bool | None = Field(None, description="true: what of the schema cannot be enforced is an error")


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), at_most(MAX_TOOLS)]


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice


class CalledFunction(Body):
    name: ToolName
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENTS_LENGTH)] | dict[str, JsonValue] | None = Field(
        None, description="JSON text, as it was answered"
    )


class EarlierCall(Body):
    """A call as a message of the assistant has it."""

    id: CallId | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    function: CalledFunction
