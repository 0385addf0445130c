"""From the bodies of Ollama's API to the body of a chat."""

from __future__ import annotations

import msgspec
from pydantic import JsonValue

from server.api.ollama_api.fields import OllamaBody, OllamaChatBody, OllamaGenerateBody, OllamaMessage
from server.protocol.request_fields import SamplingFields

Message = dict[str, JsonValue]

USUAL_EFFORT = "medium"  # of thinking that is switched on, and no more is said


def asks_nothing(body: OllamaChatBody | OllamaGenerateBody) -> bool:
    """How Ollama's clients have a model loaded, before anybody asks it something."""
    return not (body.messages if isinstance(body, OllamaChatBody) else body.prompt or body.system)


def chat_json(body: OllamaChatBody | OllamaGenerateBody) -> bytes:
    """The body of the chat, in JSON. One that asks nothing becomes an empty message, which is not to be answered."""
    if isinstance(body, OllamaChatBody) and body.messages:
        messages = _numbered([_message(message) for message in body.messages])
    elif isinstance(body, OllamaChatBody):
        messages = [{"role": "user", "content": ""}]
    else:
        messages = [{"role": "system", "content": body.system}] if body.system else []
        messages.append({"role": "user", "content": body.prompt})
    chat: dict[str, object] = {"model": body.model, "messages": messages, **_options(body)}
    if isinstance(body, OllamaChatBody) and body.tools:
        chat["tools"] = body.tools
    if isinstance(body.think, bool):
        chat["reasoning_effort"] = USUAL_EFFORT if body.think else "none"
    elif body.think is not None:
        chat["reasoning_effort"] = body.think
    if body.format == "json":
        chat["response_format"] = {"type": "json_object"}
    elif isinstance(body.format, dict):
        chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": body.format}}
    return msgspec.json.encode(chat)


def _options(body: OllamaBody) -> dict[str, object]:
    options = body.options
    if options is None:
        return {}
    chat: dict[str, object] = {
        name: value for name in SamplingFields.model_fields if (value := getattr(options, name)) is not None
    }
    if options.speculation is not None:
        chat["speculation"] = options.speculation.model_dump(exclude_none=True)
    if options.repeat_penalty is not None:
        chat["repetition_penalty"] = options.repeat_penalty
    if options.num_predict is not None and options.num_predict > 0:
        chat["max_completion_tokens"] = options.num_predict
    return chat


def _message(message: OllamaMessage) -> Message:
    said: Message = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        said["reasoning_content"] = message.thinking
    if message.tool_calls:
        calls: list[JsonValue] = []
        for call in message.tool_calls:
            arguments = msgspec.json.encode(call.function.arguments or {}).decode()
            function: JsonValue = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": call.id or "", "type": "function", "function": function})
        said["tool_calls"] = calls
    if message.role == "tool":
        said["tool_call_id"] = message.tool_call_id or ""
        if message.tool_name:
            said["name"] = message.tool_name
    return said


def _numbered(messages: list[Message]) -> list[Message]:
    """Gives calls ids where the client has none, and results those of the calls that they follow, in their order."""
    number = 0
    waiting: list[JsonValue] = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            waiting = []
            for call in calls:
                assert isinstance(call, dict)
                call["id"] = call["id"] or f"call_{number}"
                waiting.append(call["id"])
                number += 1
        elif message["role"] == "tool" and not message["tool_call_id"]:
            message["tool_call_id"] = waiting.pop(0) if waiting else f"call_{number}"
    return messages
