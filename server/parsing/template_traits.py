"""What a chat template does with tools, calls and reasoning: how a conversation must be shown to it, and what it makes
of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.parsing.answer_format import PLAIN, AnswerFormat, CallFormat

_SOURCES = {
    "template": "derived from the chat template",
    "override": "a known family, by its chat template",
    "fallback": "the chat template knows no tools, so the server describes them in the system message",
    "none": "there is no chat template that shows any",
}

FALLBACK_CALLS = CallFormat(
    call_open="<tool_call>\n", call_close="\n</tool_call>", separator="\n", name_key="name", arguments_key="arguments"
)
"""Where a template knows no tools: the form that most models have seen, which Hermes's began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """What was seen of a template.

    declares_tools: it describes tools to the model; else the server does, in the system message
    tools_in_system: it does so where they stand, as JSON, in the system message's `tools`
    shows_calls, shows_results: it writes `tool_calls` of the assistant, and messages of the role tool
    """

    answer_format: AnswerFormat = PLAIN
    declares_tools: bool = False
    tools_in_system: bool = False
    shows_calls: bool = False
    shows_results: bool = False
    shows_system: bool = True
    arguments_are_text: bool = False  # it wants a call's arguments as JSON text, not as an object
    calls_without_content: bool = False  # it wants null as the content of a message that only calls, not ""
    has_short_ids: bool = False  # it takes ids of calls of nine letters and digits alone
    reasoning_keys: tuple[str, ...] = ()  # fields of a message that it reads reasoning from
    reasoning_in_parts: bool = False  # it reads reasoning from parts of the content of the type thinking
    switches: frozenset[str] = frozenset()  # variables that turn reasoning on and off, of those that are known
    notes: tuple[str, ...] = ()  # for people

    def describe(self) -> Iterator[tuple[str, str, str]]:
        """For people: what (tool_calls, reasoning), in which format, and why."""
        form = self.answer_format
        why = "; ".join((_SOURCES[form.source], *self.notes))
        yield "tool_calls", form.name if form.is_harmony or form.calls is not None else "none", why
        reasoning = form.reasoning
        if form.is_harmony:
            yield "reasoning", "the analysis channel", "part of the format"
        elif reasoning is None:
            yield "reasoning", "none", "the chat template shows none"
        else:
            between = f"{reasoning.open.strip()} ... {reasoning.close.strip()}"
            yield "reasoning", between, "from the chat template"
