"""The tools that a request lets the model call, and whether it must: checked, and in the form that parsers and grammars
need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from server.errors import bad_request
from server.parsing.argument_kinds import parameter_kinds
from server.parsing.call_readers import ToolKinds
from server.protocol.tool_fields import AllowedToolChoice, NamedTool, Tool, ToolChoice

MAX_SCHEMA_DEPTH = 64  # objects and lists in each other
NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class CallableTool:
    """One tool. place: in the request's list"""

    name: str
    schema: Mapping[str, object]
    is_strict: bool
    place: int


@dataclass(frozen=True, slots=True)
class CallableTools:
    """The tools that may be called. must_call: the answer is a call, and no text"""

    tools: tuple[CallableTool, ...]
    must_call: bool
    is_parallel: bool

    @property
    def kinds(self) -> ToolKinds:
        return {tool.name: parameter_kinds(tool.schema) for tool in self.tools}

    @property
    def is_strict(self) -> bool:
        """Whether what a model writes has to be held to the schemas, or else the request refused."""
        return self.must_call or any(tool.is_strict for tool in self.tools)


def read_tools(
    tools: list[Tool] | None, choice: ToolChoice | None, *, is_parallel: bool, max_tools: int, max_bytes: int
) -> CallableTools | None:
    """What a request's fields come to; None where nothing may be called. Raises ApiError 400."""
    given = tools or []
    check_tools(given, max_tools=max_tools, max_bytes=max_bytes)
    if not given and choice not in (None, "none", "auto"):
        raise bad_request(
            "tool_choice needs tools, and there are none; send tools, or leave it out", param="tool_choice"
        )
    names, must_call = _chosen(choice)
    if not given or choice == "none":
        return None
    known = {tool.function.name for tool in given}
    for name in names or ():
        if name not in known:
            raise bad_request(
                f"tool_choice names the function {name[:128]!r}, which is not one of the {len(given)} tools "
                f"({_listed(sorted(known))}); name one of them, or add it to tools",
                param="tool_choice",
            )
    callable_tools = tuple(
        CallableTool(
            tool.function.name,
            _schema_of(tool),
            tool.function.strict is True,
            place,
        )
        for place, tool in enumerate(given)
        if names is None or tool.function.name in names
    )
    return CallableTools(callable_tools, must_call, is_parallel and not isinstance(choice, NamedTool))


def _schema_of(tool: Tool) -> Mapping[str, object]:
    """Of its arguments; a tool that says nothing of any has none."""
    parameters = tool.function.parameters
    return NO_ARGUMENTS if parameters is None else {"type": "object", **parameters}


def _chosen(choice: ToolChoice | None) -> tuple[set[str] | None, bool]:
    """The names that may be called, None: all; and whether one must be."""
    if isinstance(choice, NamedTool):
        return {choice.function.name}, True
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        return {tool.function.name for tool in allowed.tools}, allowed.mode == "required"
    return None, choice == "required"


def check_tools(tools: list[Tool], *, max_tools: int, max_bytes: int) -> None:
    """Refuses too many tools, too large ones, two of one name, and what is no schema. Raises ApiError 400."""
    if len(tools) > max_tools:
        raise bad_request(
            f"tools: {len(tools)} are more than the {max_tools} that limits.max_tools allows; send fewer", param="tools"
        )
    places: dict[str, int] = {}
    measure = _Measure(max_bytes)
    for place, tool in enumerate(tools):
        name = tool.function.name
        if name in places:
            raise bad_request(
                f"tools[{place}] and tools[{places[name]}] have the same name, {name!r}; give each its own",
                param=f"tools[{place}].function.name",
            )
        places[name] = place
        param = f"tools[{place}].function"
        measure.add_text((tool.function.description or "") + name, param)
        measure.add(tool.function.parameters or {}, f"{param}.parameters", depth=1)
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise bad_request(
                f"{param}.parameters.type is {json.dumps(kind)[:100]}, but arguments are always an object; make it "
                "'object'",
                param=f"{param}.parameters.type",
            )


class _Measure:
    """Counts the bytes of tools, and stops at the first one too many."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def add_text(self, text: str, param: str) -> None:
        self._num_bytes += len(text.encode(errors="replace")) + 4
        self._check(param)

    def add(self, value: object, param: str, *, depth: int) -> None:
        if depth > MAX_SCHEMA_DEPTH:
            raise bad_request(
                f"{param} is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter", param=param
            )
        if isinstance(value, str):
            self.add_text(value, param)
        elif isinstance(value, dict):
            for key, inner in value.items():
                self.add_text(key, param)
                self.add(inner, param, depth=depth + 1)
        elif isinstance(value, list):
            for inner in value:
                self.add(inner, param, depth=depth + 1)
        else:
            self._num_bytes += 4
            self._check(param)

    def _check(self, param: str) -> None:
        if self._num_bytes > self._max_bytes:
            raise bad_request(
                f"tools: up to {param} they have {self._num_bytes} bytes, more than the {self._max_bytes} that "
                "limits.max_tool_bytes allows; send fewer tools, or shorter descriptions",
                param="tools",
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"
