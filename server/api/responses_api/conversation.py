"""From the body of a response to the body of a chat: items become messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from pydantic import JsonValue

from server.api.responses_api.fields import Format, Item, Parts, ResponsesBody
from server.errors import ApiError, bad_request
from server.protocol.request_fields import SamplingFields

Message = dict[str, JsonValue]

INSTRUCTING = ("system", "developer")
ROLES = (*INSTRUCTING, "user", "assistant")
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
MESSAGES, CALLS = ("message",), ("function_call", "function_call_output")
SHARED = (
    *SamplingFields.model_fields, "strict", "priority", "cache_salt", "request_id", "timeout", "chat_template_kwargs",
    "parallel_tool_calls", "user", "metadata",
)  # fmt: skip
LOGPROBS = "message.output_text.logprobs"


@dataclass(slots=True)
class Conversation:
    """The messages of a chat, and what of the items had no counterpart. items: in JSON, as they are kept"""

    messages: list[Message] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    items: bytes = b"[]"


def check_honoured(body: ResponsesBody) -> None:
    """Raises ApiError 400 for what would change the answer and is not there."""
    if body.background:
        raise bad_request(
            "background responses are not supported: the answer would be lost with the server; send background: false "
            "and stream it, or wait for it",
            param="background",
        )
    if isinstance(body.input, list) and not body.input and body.previous_response_id is None:
        raise bad_request("input is empty; send a text, or at least one item", param="input")


def read_items(items: str | Sequence[Item]) -> Conversation:
    """The messages that the items are. Raises ApiError 400 that names the item."""
    if isinstance(items, str):
        return Conversation([{"role": "user", "content": items}])
    conversation, reasoning = Conversation(), ""
    for place, item in enumerate(items):
        where, kind = f"input[{place}]", item.type or "message"
        if kind == "reasoning":
            texts = [_text(parts, where) for parts in (item.content, item.summary) if parts]
            reasoning += texts[0] if texts else ""
        elif kind in MESSAGES:
            conversation.messages.append(_message(item, where, reasoning))
            reasoning = ""
        elif kind in CALLS:
            _add_call(item, kind, where, conversation.messages, reasoning)
            reasoning = ""
        else:
            conversation.ignored.append(f"{where} ({kind[:64]})")
    return conversation


def _message(item: Item, where: str, reasoning: str) -> Message:
    if item.role not in ROLES:
        raise bad_request(f"{where}.role should be one of {', '.join(ROLES)}", param=f"{where}.role")
    if item.content is None:
        raise bad_request(f"{where}.content is required", param=f"{where}.content")
    message: Message = {"role": item.role, "content": _text(item.content, where)}
    if item.role == "assistant" and reasoning:
        message["reasoning_content"] = reasoning
    return message


def _add_call(item: Item, kind: str, where: str, messages: list[Message], reasoning: str) -> None:
    """A call belongs to the assistant's message before it, its output is a message of the tool."""
    if item.call_id is None:
        raise bad_request(f"{where}.call_id is required", param=f"{where}.call_id")
    if kind == "function_call_output":
        if item.output is None:
            raise bad_request(f"{where}.output is required", param=f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, where)})
        return
    if not item.name:
        raise bad_request(f"{where}.name is required", param=f"{where}.name")
    function: JsonValue = {"name": item.name, "arguments": item.arguments or "{}"}
    call: JsonValue = {"id": item.call_id, "type": "function", "function": function}
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or reasoning:
        last = {"role": "assistant", "content": None, "tool_calls": []}
        if reasoning:
            last["reasoning_content"] = reasoning
        messages.append(last)
    calls = last.setdefault("tool_calls", [])
    assert isinstance(calls, list)
    calls.append(call)


def _text(content: str | Parts, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        param = f"{where}.content[{place}].type"
        if part.type == "refusal":
            texts.append(part.refusal or "")
        elif part.type in TEXT_PARTS:
            if part.text is None:
                raise bad_request(f"{where}.content[{place}].text is required", param=param)
            texts.append(part.text)
        else:
            raise bad_request(
                f"{param}: {part.type[:64]!r} parts are not supported, the model reads text only; send text parts",
                param=param,
            )
    return "\n".join(texts)


def items_json(items: str | Sequence[Item]) -> bytes:
    """The items as a client is told them again; a text is a message of the user."""
    if isinstance(items, str):
        parts = [{"type": "input_text", "text": items}]
        return msgspec.json.encode([{"type": "message", "role": "user", "content": parts}])
    return msgspec.json.encode([item.model_dump(exclude_none=True) for item in items])


def chat_json(body: ResponsesBody, conversation: Conversation, *, before: Sequence[msgspec.Raw]) -> bytes:
    """The body of the chat, in JSON. before: the messages of the response that it follows

    Names in `conversation.ignored` what has no counterpart. Raises ApiError 400.
    """
    chat: dict[str, object] = {name: value for name in SHARED if (value := getattr(body, name)) is not None}
    if body.speculation is not None:
        chat["speculation"] = body.speculation.model_dump(exclude_none=True)
    chat["model"] = body.model
    chat["messages"] = _with_instructions(body.instructions, before, conversation.messages)
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if body.top_logprobs or LOGPROBS in (body.include or ()):
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.reasoning is not None and body.reasoning.effort is not None:
        chat["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        chat["response_format"] = _response_format(body.text.format)
    tools = _tools(body, conversation)
    if tools:
        chat["tools"] = tools
        if body.tool_choice is not None:
            chat["tool_choice"] = _tool_choice(body.tool_choice)
    elif body.tool_choice not in (None, "auto", "none"):
        raise bad_request("tool_choice asks for a call, and no function is among the tools", param="tool_choice")
    return msgspec.json.encode(chat)


def _with_instructions(
    instructions: str | None, before: Sequence[msgspec.Raw], messages: list[Message]
) -> list[Message | msgspec.Raw]:
    """Instructions, and messages of a system or a developer that begin the input, are one message of the system: many
    templates take one, and that first."""
    own = list(messages)
    texts = [instructions] if instructions else []
    while not before and own and own[0]["role"] in INSTRUCTING:
        texts.append(str(own.pop(0)["content"]))
    system: list[Message] = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    return [*system, *before, *own]


def _response_format(wanted: Format) -> Message:
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.schema_ is None:
        raise bad_request("text.format.schema is required", param="text.format.schema")
    schema: Message = {"name": wanted.name or "answer", "schema": wanted.schema_}
    if wanted.description is not None:
        schema["description"] = wanted.description
    if wanted.strict is not None:
        schema["strict"] = wanted.strict
    return {"type": "json_schema", "json_schema": schema}


def _tools(body: ResponsesBody, conversation: Conversation) -> list[Message]:
    """The functions among the tools, in the chat's form."""
    tools: list[Message] = []
    for place, tool in enumerate(body.tools or ()):
        kind = tool.get("type")
        if kind != "function":
            conversation.ignored.append(f"tools[{place}] ({str(kind)[:64]})")
            continue
        if not isinstance(tool.get("name"), str):
            raise bad_request(f"tools[{place}].name is required", param=f"tools[{place}].name")
        kept = ("name", "description", "parameters", "strict")
        tools.append(
            {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
        )
    return tools


def _tool_choice(choice: str | Mapping[str, JsonValue]) -> JsonValue:
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "allowed_tools":
        return _allowed(choice)
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    raise _no_choice(choice)


def _allowed(choice: Mapping[str, JsonValue]) -> JsonValue:
    """A choice among some of the tools; those that are no functions were left out."""
    tools = choice.get("tools")
    names = [tool.get("name") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    functions: list[JsonValue] = [
        {"type": "function", "function": {"name": name}} for name in names if isinstance(name, str)
    ]
    mode = "required" if choice.get("mode") == "required" else "auto"
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": functions}} if functions else mode


def _no_choice(choice: Mapping[str, JsonValue]) -> ApiError:
    return bad_request(
        f"tool_choice: {str(choice.get('type'))[:64]!r} is not supported; send 'none', 'auto', 'required', a function "
        "with its name, or allowed_tools",
        param="tool_choice",
    )
