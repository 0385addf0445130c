"""The request fields that ask for structured output: OpenAI's `response_format`, vLLM's `structured_outputs`, and the
names that vLLM had for its parts before (`guided_json` and others).

How large a schema, and how long an expression may be, is bounded where they are compiled
(`server.structured.grammar_checker`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue

MAX_CHOICES = 4096


class StructuredPart(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), frozen=True, populate_by_name=False
    )


Schema = dict[str, JsonValue] | bool
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
ValueObject = dict[str, JsonValue]


class TextFormat(StructuredPart):
    type: Literal["text"]


class JsonObjectFormat(StructuredPart):
    type: Literal["json_object"]
    given_schema: ValueObject | None = Field(None, alias="schema", description="a JSON Schema; default: any object")


class NamedSchema(StructuredPart):
    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    given_schema: Schema | None = Field(None, alias="schema", description="a JSON Schema; default: any JSON")
    strict: bool | None = Field(
        None, description="false: keywords that cannot be enforced are ignored; else they are refused"
    )


class JsonSchemaFormat(StructuredPart):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuralTagFormat(StructuredPart):
    type: Literal["structural_tag"]
    format: ValueObject | None = Field(None, description="what the answer consists of")
    structures: list[ValueObject] | None = Field(None, description="tags, each with begin, schema and end")
    triggers: list[str] | None = Field(None, description="texts that begin tags")


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Discriminator("type")
]


class StructuredOutputs(StructuredPart):
    """One of json, json_object, regex, choice, grammar and structural_tag."""

    given_json: Schema | str | None = Field(None, alias="json", description="a JSON Schema, or the text of one")
    json_object: bool | None = Field(None, description="any JSON object")
    regex: str | None = Field(None, description="a regular expression that the whole answer matches")
    choice: Choices | None = Field(None, description="texts of which the answer is one")
    grammar: str | None = Field(None, description="a Lark or GBNF grammar")
    structural_tag: ValueObject | str | None = Field(None, description="as of response_format, or the text of one")
    disable_any_whitespace: bool | None = Field(None, description="no blanks between the tokens of JSON")
    disable_additional_properties: bool | None = Field(
        None, description="objects whose schema does not say otherwise have no further properties"
    )
    whitespace_pattern: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="a regular expression of the blanks between the tokens of JSON"
    )
