"""From the body of a message to the body of a chat: blocks become messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from pydantic import JsonValue

from server.api.messages_api.fields import Block, CountBody, MessagesBody, ToolChoice, Turn
from server.errors import bad_request
from server.protocol.request_fields import SamplingFields

Message = dict[str, JsonValue]

BILLING_HEADER = re.compile(r"\s*x-anthropic-billing-header:[^\n]*(\n|$)", re.IGNORECASE)
"""A line that a client of Anthropic's puts first, other in each request: it would keep prefixes from being the same."""

SHARED = (
    *SamplingFields.model_fields,
    "strict",
    "chat_template_kwargs",
    "priority",
    "cache_salt",
    "request_id",
    "timeout",
)
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
THOUGHTS = ("thinking", "redacted_thinking")
USUAL_EFFORT = "medium"  # of thinking that is switched on, and no more is said
FUNCTIONS = (None, "custom")  # types of tools that the client runs by a schema of its own


class Reader:
    """Reads turns, one after the other. `messages` are the chat's, `ignored` names what has no counterpart."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.ignored: list[str] = []

    def read(self, turn: Turn, where: str) -> None:
        if isinstance(turn.content, str):
            self.messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            self._read_answer(turn.content, where)
        else:
            self._read_said(turn.role, turn.content, where)

    def text_of(self, blocks: Sequence[Block], where: str, *, between: str) -> str:
        """The texts of blocks that are nothing else. Raises ApiError 400 for images."""
        texts = (self._text(block, f"{where}[{place}]") for place, block in enumerate(blocks))
        return between.join(text for text in texts if text)

    def _read_said(self, role: str, blocks: Sequence[Block], where: str) -> None:
        """What a user says. Results of tools are messages of their own, in their place."""
        texts: list[str] = []
        num_before = len(self.messages)
        for place, block in enumerate(blocks):
            spot = f"{where}.content[{place}]"
            if block.type == "tool_result":
                self._flush(role, texts)
                self._add_result(block, spot)
            elif (text := self._text(block, spot)) is not None:
                texts.append(text)
        self._flush(role, texts)
        if len(self.messages) == num_before:  # no block, or none that is read: it is a turn all the same
            self.messages.append({"role": role, "content": ""})

    def _flush(self, role: str, texts: list[str]) -> None:
        if texts:
            self.messages.append({"role": role, "content": "\n\n".join(texts)})
            texts.clear()

    def _add_result(self, block: Block, where: str) -> None:
        if block.tool_use_id is None:
            raise bad_request(f"{where}.tool_use_id is required", param=f"{where}.tool_use_id")
        content = block.content or ""
        if not isinstance(content, str):
            blocks = content if isinstance(content, list) else []
            inner = [each for each in blocks if isinstance(each, Block)]
            if len(inner) != len(blocks) or isinstance(content, dict):
                raise bad_request(f"{where}.content should be a text or a list of blocks", param=f"{where}.content")
            content = self.text_of(inner, f"{where}.content", between="\n")
        self.messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})

    def _read_answer(self, blocks: Sequence[Block], where: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[JsonValue] = []
        for place, block in enumerate(blocks):
            spot = f"{where}.content[{place}]"
            if block.type in THOUGHTS:
                thoughts.append(block.thinking or "")
            elif block.type == "tool_use":
                calls.append(_call(block, spot))
            elif (text := self._text(block, spot)) is not None:
                texts.append(text)
        message: Message = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
        if any(thoughts):
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)

    def _text(self, block: Block, where: str) -> str | None:
        """None for a block that is left out, and named."""
        if block.type == "text":
            if block.text is None:
                raise bad_request(f"{where}.text is required", param=f"{where}.text")
            return block.text
        source = block.source
        if block.type == "document" and source is not None and source.type == "text" and source.data is not None:
            return source.data
        if block.type in ("image", "document"):
            raise bad_request(
                f"{where}.type: {block.type!r} blocks are not supported, the model reads text only; send text blocks",
                param=f"{where}.type",
            )
        self.ignored.append(f"{where} ({block.type[:64]})")
        return None


def _call(block: Block, where: str) -> JsonValue:
    for name in ("id", "name"):
        if not getattr(block, name):
            raise bad_request(f"{where}.{name} is required", param=f"{where}.{name}")
    arguments = msgspec.json.encode(block.input or {}).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def chat_json(body: CountBody) -> tuple[bytes, list[str]]:
    """The body of the chat, in JSON, and the names of what has no counterpart in it. Raises ApiError 400."""
    reader = Reader()
    system = body.system if isinstance(body.system, str) else ""
    if isinstance(body.system, list):
        blocks = [
            block.model_copy(update={"text": without_billing(block.text)}) if block.text else block
            for block in body.system
        ]
        system = reader.text_of(blocks, "system", between="\n\n")
    if system := without_billing(system):
        reader.messages.append({"role": "system", "content": system})
    for place, turn in enumerate(body.messages):
        reader.read(turn, f"messages[{place}]")
    chat: dict[str, object] = {name: value for name in SHARED if (value := getattr(body, name, None)) is not None}
    if body.speculation is not None:
        chat["speculation"] = body.speculation.model_dump(exclude_none=True)
    chat |= {"model": body.model, "messages": reader.messages}
    last = reader.messages[-1]
    if last["role"] == "assistant" and "tool_calls" not in last:  # its beginning is given
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesBody):
        chat["max_completion_tokens"] = body.max_tokens
        if body.stop_sequences:
            chat["stop"] = body.stop_sequences
    _add_tools(body, chat, reader.ignored)
    _add_options(body, chat)
    return msgspec.json.encode(chat), reader.ignored


def without_billing(text: str) -> str:
    match = BILLING_HEADER.match(text)
    return text[match.end() :].lstrip("\n") if match else text


def _add_tools(body: CountBody, chat: dict[str, object], ignored: list[str]) -> None:
    tools: list[Message] = []
    for place, tool in enumerate(body.tools or ()):
        if tool.get("type") not in FUNCTIONS:
            ignored.append(f"tools[{place}] ({str(tool.get('type'))[:64]})")
            continue
        if not isinstance(tool.get("name"), str):
            raise bad_request(f"tools[{place}].name is required", param=f"tools[{place}].name")
        function: Message = {"name": tool["name"], "parameters": tool.get("input_schema") or {"type": "object"}}
        for name in ("description", "strict"):
            if tool.get(name) is not None:
                function[name] = tool[name]
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    if tools:
        chat["tools"] = tools
        if choice is not None:
            chat["tool_choice"] = _tool_choice(choice)
            if choice.disable_parallel_tool_use:
                chat["parallel_tool_calls"] = False
    elif choice is not None and choice.type in ("any", "tool"):
        raise bad_request("tool_choice asks for a call, and none of the tools has an input_schema", param="tool_choice")


def _tool_choice(choice: ToolChoice) -> JsonValue:
    if choice.type != "tool":
        return CHOICES[choice.type]
    if choice.name is None:
        raise bad_request("tool_choice.name is required with type 'tool'", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _add_options(body: CountBody, chat: dict[str, object]) -> None:
    config = body.output_config
    effort = config.effort if config is not None else None
    if body.thinking is not None:
        effort = "none" if body.thinking.type == "disabled" else effort or USUAL_EFFORT
    if effort is not None:
        chat["reasoning_effort"] = effort
    wanted = body.output_format or (config.format if config is not None else None)
    if wanted is not None:
        chat["response_format"] = {
            "type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.schema_}
        }  # fmt: skip
