"""A conversation as a chat template is shown it: turns, with calls, results and reasoning in the form that it takes.

Where a template knows no tools, the server writes them into the system message, calls as the text that a model would
have written, and results as messages of the user.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from server.parsing.answer_format import CallFormat
from server.parsing.derive_traits import Turn
from server.parsing.template_traits import FALLBACK_CALLS, TemplateTraits
from server.protocol.chat_fields import AssistantMessage, ChatMessage, Content, ToolMessage
from server.protocol.tool_fields import EarlierCall, Tool

ToolObject = dict[str, object]
_INSTRUCTIONS = """\
You can call functions. Each line between these tags describes one of them in JSON:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object between these tags, one pair of tags for each call:
<tool_call>
{{"name": "name of the function", "arguments": {{"name of an argument": "its value"}}}}
</tool_call>
What a function returns comes back between <tool_response> and </tool_response>. Call a function only if it helps; \
otherwise answer as you would without."""


def tool_objects(tools: Sequence[Tool] | None) -> list[ToolObject]:
    """The tools as templates read them: what the client said of them, and no more."""
    return [tool.model_dump(mode="python", exclude_unset=True) for tool in tools or ()]


def shown_tools(tools: list[ToolObject], traits: TemplateTraits) -> list[ToolObject] | None:
    """The tools that the template is given; None where it does not describe them itself."""
    return tools if tools and traits.declares_tools else None


def conversation(messages: Sequence[ChatMessage], tools: list[ToolObject], traits: TemplateTraits) -> list[Turn]:
    """The turns of a conversation. tools: those that the model may call now"""
    names: dict[str, str] = {}  # by the id of the call
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, AssistantMessage):
            names |= {call.id: call.function.name for call in message.tool_calls or () if call.id is not None}
            turns.append(_assistant_turn(message, traits))
        elif isinstance(message, ToolMessage):
            _add_result(turns, message, names, traits)
        elif _follows_rewritten_result(turns, message.role):
            turns[-1] = {"role": "user", "content": f"{turns[-1]['content']}\n\n{text_of(message.content)}"}
        else:
            turn: Turn = {"role": message.role, "content": text_of(message.content)}
            turns.append(turn if message.name is None else {**turn, "name": message.name})
    if tools and not traits.declares_tools:
        _write_tools(turns, tools, traits)
    return [{key: value for key, value in turn.items() if key != _IS_RESULT} for turn in turns]


_IS_RESULT = "is a result"  # of a turn that was written for one


def text_of(content: Content | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content or ())


def _assistant_turn(message: AssistantMessage, traits: TemplateTraits) -> Turn:
    text = text_of(message.content)
    turn: Turn = {"role": "assistant", "content": text}
    if message.name is not None:
        turn["name"] = message.name
    calls = message.tool_calls or []
    if calls and traits.shows_calls:
        if not text and traits.calls_without_content:
            turn["content"] = None
        turn["tool_calls"] = [_call_object(call, i, traits) for i, call in enumerate(calls)]
    elif calls:
        written = write_calls(calls, traits.answer_format.calls or FALLBACK_CALLS)
        turn["content"] = f"{text}\n{written}" if text else written
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        _add_reasoning(turn, reasoning, traits)
    return turn


def _add_reasoning(turn: Turn, reasoning: str, traits: TemplateTraits) -> None:
    if traits.reasoning_in_parts and reasoning:
        said = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
        turn["content"] = [{"type": "thinking", "thinking": reasoning}, *said]
    for key in traits.reasoning_keys or ("reasoning_content",):
        turn[key] = reasoning


def _call_object(call: EarlierCall, index: int, traits: TemplateTraits) -> ToolObject:
    arguments = _arguments_of(call)
    if traits.arguments_are_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = call.id if call.id is not None else f"call_{index}"
    return {
        "id": _short_id(call_id) if traits.has_short_ids else call_id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _arguments_of(call: EarlierCall) -> object:
    """An object; or, where a model has written what is none, its text: the template may show that."""
    given = call.function.arguments
    if not isinstance(given, str):
        return given or {}
    if not given.strip():
        return {}
    try:
        parsed = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return parsed if isinstance(parsed, dict) else given


def _short_id(call_id: str) -> str:
    """An id of nine letters and digits: the id itself, or one that always follows from it."""
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode(errors="replace"), digest_size=5).hexdigest()[:9]


def _add_result(turns: list[Turn], message: ToolMessage, names: dict[str, str], traits: TemplateTraits) -> None:
    text = text_of(message.content)
    if traits.shows_results and (traits.declares_tools or traits.tools_in_system):
        turn: Turn = {"role": "tool", "content": text}
        name = message.name if message.name is not None else names.get(message.tool_call_id or "")
        if name is not None:
            turn["name"] = name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = _short_id(message.tool_call_id) if traits.has_short_ids else message.tool_call_id
        turns.append(turn)
        return
    written = f"<tool_response>\n{text}\n</tool_response>"
    if _follows_rewritten_result(turns, "user"):
        turns[-1]["content"] = f"{turns[-1]['content']}\n{written}"
    else:
        turns.append({"role": "user", "content": written, _IS_RESULT: True})


def _follows_rewritten_result(turns: list[Turn], role: str) -> bool:
    """Whether a turn of the user comes right behind one that was written for results: they become one, as roles take
    turns."""
    return role == "user" and bool(turns) and _IS_RESULT in turns[-1]


def _write_tools(turns: list[Turn], tools: list[ToolObject], traits: TemplateTraits) -> None:
    is_system = bool(turns) and turns[0]["role"] in ("system", "developer")
    if traits.tools_in_system:
        if not is_system:
            turns.insert(0, {"role": "system", "content": ""})
        turns[0]["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
        return
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=described)
    if is_system and traits.shows_system:
        turns[0]["content"] = f"{turns[0]['content']}\n\n{text}" if turns[0]["content"] else text
    elif traits.shows_system:
        turns.insert(0, {"role": "system", "content": text})
    else:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            turns.insert(0, {"role": "user", "content": text})
        else:
            first["content"] = f"{text}\n\n{first['content']}"


def write_calls(calls: Sequence[EarlierCall], form: CallFormat) -> str:
    """Calls as a model writes them, for templates that do not. form: of kind json, as all such are"""
    objects = [
        json.dumps({form.name_key: call.function.name, form.arguments_key: _arguments_of(call)}, ensure_ascii=False)
        for call in calls
    ]
    return form.opening + form.between.join(objects) + form.closing
