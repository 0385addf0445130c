# ruff: noqa: E501
"""Answers in the wire formats of families of models, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from server.parsing.answer_format import AnswerFormat, CallFormat, ReasoningFormat
from server.parsing.answer_parts import AnswerCollector, AnswerDelta, AnswerParser, ParsedAnswer
from server.parsing.call_emitter import merged
from server.parsing.call_readers import ToolKinds
from server.parsing.harmony_parser import HarmonyParser
from server.parsing.marked_parser import MarkedParser

THINK = ReasoningFormat(open="<think>\n", close="\n</think>\n\n")
HERMES = CallFormat(call_open="<tool_call>\n", call_close="\n</tool_call>", separator="\n")
FORMATS = {
    "hermes": AnswerFormat(calls=HERMES, reasoning=THINK),
    "llama": AnswerFormat(
        calls=CallFormat(is_bare=True, arguments_key="parameters", other_triggers=("<|python_tag|>",))
    ),
    "mistral list": AnswerFormat(calls=CallFormat(section_open="[TOOL_CALLS] ", is_list=True, separator=", ")),
    "mistral args": AnswerFormat(
        calls=CallFormat(kind="named", call_open="[TOOL_CALLS]", name_end="[ARGS]"),
        reasoning=ReasoningFormat(open="[THINK]", close="[/THINK]"),
    ),
    "mistral ids": AnswerFormat(
        calls=CallFormat(kind="named", call_open="[TOOL_CALLS]", id_open="[CALL_ID]", name_end="[ARGS]")
    ),
    "deepseek": AnswerFormat(
        calls=CallFormat(
            kind="named",
            section_open="<｜tool▁calls▁begin｜>",
            call_open="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            name_end="\n```json\n",
            call_close="\n```<｜tool▁call▁end｜>",
            separator="\n",
            section_close="<｜tool▁calls▁end｜>",
        ),
        reasoning=THINK,
    ),
    "qwen coder": AnswerFormat(
        calls=CallFormat(
            kind="tagged",
            call_open="<tool_call>\n<function=",
            name_end=">\n",
            key_open="<parameter=",
            key_close=">\n",
            value_close="\n</parameter>\n",
            call_close="</function>\n</tool_call>",
        )
    ),
    "glm": AnswerFormat(
        calls=CallFormat(
            kind="tagged",
            call_open="<tool_call>",
            name_end="\n",
            key_open="<arg_key>",
            key_close="</arg_key>\n<arg_value>",
            value_close="</arg_value>\n",
            call_close="</tool_call>",
        ),
        reasoning=ReasoningFormat(open="<think>", close="</think>\n"),
    ),
    "gemma": AnswerFormat(
        calls=CallFormat(kind="loose", call_open="<|tool_call>call:", call_close="<tool_call|>", quote='<|"|>'),
        reasoning=ReasoningFormat(open="<|channel>thought\n", close="<channel|>"),
    ),
    "phi": AnswerFormat(
        calls=CallFormat(
            section_open="<|tool_call|>", section_close="<|/tool_call|>", is_list=True, other_triggers=("functools",)
        )
    ),
    "granite": AnswerFormat(
        calls=CallFormat(section_open="<|tool_call|>", is_list=True),
        reasoning=ReasoningFormat(
            open="<think>", close="</think>", answer_open="<response>", answer_close="</response>"
        ),
    ),
    "harmony": AnswerFormat(is_harmony=True),
}
TOOLS: ToolKinds = {
    "weather": {"city": frozenset({"string"}), "days": frozenset({"integer"})},
    "now": {},
    "note": {"text": frozenset({"string"}), "tags": frozenset({"array"}), "pinned": frozenset({"boolean"})},
}
PARIS, NOW = ("weather", {"city": "Paris", "days": 3}), ("now", {})
QUOTED = ("note", {"text": 'say "hi" {to} <all> \\ 你好 🙂', "tags": ["a", "b"], "pinned": True})


@dataclass(frozen=True)
class Written:
    """An answer as a model writes it, and its parts."""

    style: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, dict[str, object]]] = ()
    is_thinking: bool = False
    ids: Sequence[str] = field(default=())


def _object(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def _tagged(name: str, arguments: dict[str, object]) -> str:
    written = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


def _deepseek(*calls: tuple[str, dict[str, object]]) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


ANSWERS = [
    Written("hermes", "Just text, with < and <tool and { in it.\n", "Just text, with < and <tool and { in it.\n"),
    Written("hermes", f"<tool_call>\n{_object(*PARIS)}\n</tool_call>", calls=[PARIS]),
    Written(
        "hermes",
        f"Let me see.\n<tool_call>\n{_object(*PARIS)}\n</tool_call>\n<tool_call>\n{_object(*QUOTED)}\n</tool_call>\n",
        "Let me see.",
        calls=[PARIS, QUOTED],
    ),
    Written(
        "hermes",
        f"<think>\nA <tool_call> would do.\n</think>\n\nHere:\n<tool_call>{_object(*NOW)}</tool_call> That is all.",
        "Here:That is all.",
        "A <tool_call> would do.",
        [NOW],
    ),
    Written("hermes", "still thinking\n</think>\n\nDone.", "Done.", "still thinking", is_thinking=True),
    Written("hermes", "<think>\nagain\n</think>Done.", "Done.", "again", is_thinking=True),
    Written("hermes", "<think>\n\n</think>\n\nDone.", "Done."),
    Written("hermes", "no end of it", "", "no end of it", is_thinking=True),
    Written("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>', calls=[("weather", {"city": "Oslo"})]),
    Written("hermes", '<tool_call>{"name": "now"}</tool_call>', calls=[NOW]),
    Written("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', calls=[NOW]),
    Written("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>', calls=[("weather", {"city": "Rome"})]),
    Written("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}</tool_call>', calls=[("weather", {"city": "Rome"})]),
    Written("hermes", '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>', calls=[NOW]),
    Written("hermes", '<tool_call>{"name": "note", "arguments": {"text": "two\nlines"}}</tool_call>', calls=[("note", {"text": "two\nlines"})]),
    Written("hermes", f"<tool_call>{_object(*NOW)}", calls=[NOW]),
    Written("llama", _object(*PARIS, key="parameters"), calls=[PARIS]),
    Written("llama", f"<|python_tag|>{_object(*PARIS, key='parameters')}", calls=[PARIS]),
    Written("llama", f"{_object(*PARIS, key='parameters')}; {_object(*NOW, key='parameters')}", calls=[PARIS, NOW]),
    Written("llama", '{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}'),
    Written("llama", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}'),
    Written("llama", "Use {} for it.", "Use {} for it."),
    Written("mistral list", f"[TOOL_CALLS] [{_object(*PARIS)}, {_object(*NOW)}]", calls=[PARIS, NOW]),
    Written(
        "mistral list",
        '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abcdefghi"}, {"id": "ABCDEFGHI", "name": "now", "arguments": {}}]',
        calls=[NOW, NOW],
        ids=["", "ABCDEFGHI"],
    ),
    Written("mistral args", '[THINK]which?[/THINK]Well.[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[ARGS]{}', "Well.", "which?", [PARIS, NOW]),
    Written("mistral args", f"[TOOL_CALLS][{_object(*PARIS)}]", calls=[PARIS]),
    Written("mistral ids", "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", calls=[NOW], ids=["abcdefghi"]),
    Written("deepseek", f"I look.{_deepseek(PARIS, NOW)}", "I look.", calls=[PARIS, NOW]),
    Written("deepseek", f"so\n</think>\n\n{_deepseek(NOW)}", "", "so", [NOW], is_thinking=True),
    Written("qwen coder", f"Yes.\n{_tagged(*PARIS)}\n{_tagged(*QUOTED)}", "Yes.", calls=[PARIS, QUOTED]),
    Written("qwen coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", calls=[NOW]),
    Written(
        "qwen coder",
        "<tool_call>\n<function=note>\n<parameter=text>\n  two\n\nlines\n\n</parameter>\n<parameter=pinned>\nTrue\n</parameter>\n</function>\n</tool_call>",
        calls=[("note", {"text": "  two\n\nlines\n", "pinned": True})],
    ),
    Written(
        "glm",
        "<think>hm</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "",
        "hm",
        [PARIS, NOW],
    ),
    Written(
        "gemma",
        '<|channel>thought\nhm\n<channel|>Ok.<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "Ok.",
        "hm",
        [PARIS, NOW],
    ),
    Written(
        "gemma",
        '<|tool_call>call:note{text:<|"|>a "b", {c}<|"|>,tags:[<|"|>x<|"|>,<|"|>y<|"|>],pinned:false,deep:{a:[1.5,null]}}<tool_call|>',
        calls=[("note", {"text": 'a "b", {c}', "tags": ["x", "y"], "pinned": False, "deep": {"a": [1.5, None]}})],
    ),
    Written("phi", f"<|tool_call|>[{_object(*PARIS)}, {_object(*NOW)}]<|/tool_call|>", calls=[PARIS, NOW]),
    Written("phi", f"functools[{_object(*PARIS)}]", calls=[PARIS]),
    Written("granite", "<think>hm</think><response>It is late.</response>", "It is late.", "hm"),
    Written("granite", f"<|tool_call|>[{_object(*PARIS)}]", calls=[PARIS]),
    Written(
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello.",
        "Hello.",
        "hm",
    ),
    Written(
        "harmony",
        '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}',
        "I look.",
        "hm",
        [PARIS],
    ),
    Written("harmony", " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", calls=[NOW]),
    Written("harmony", "no channels at all", "no channels at all"),
]  # fmt: skip


def special_tokens_of(text: str) -> list[str]:
    """The markers of a text that some tokenizers keep as special tokens."""
    known = (
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
        "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<|tool_call|>", "<|/tool_call|>",
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>", "<|tool_call>", "<tool_call|>",
        '<|"|>', "<|channel>", "<channel|>",
    )  # fmt: skip
    return [token for token in known if token in text]


def make_parser(
    style: str, *, hidden: Sequence[str] = (), holds: bool = False, is_thinking: bool = False, calls: bool = True
) -> AnswerParser:
    numbers = count()
    answer_format = FORMATS[style]

    def make_id() -> str:
        return f"id-{next(numbers)}"

    if answer_format.is_harmony:
        return HarmonyParser(parses_calls=calls, holds_calls=holds, hidden_tokens=hidden, make_id=make_id)
    return MarkedParser(
        answer_format,
        tools=TOOLS if calls else None,
        is_thinking=is_thinking,
        holds_calls=holds,
        hidden_tokens=hidden,
        make_id=make_id,
    )


def split_specials(text: str, tokens: Sequence[str]) -> tuple[str, list[tuple[int, str]]]:
    """The text without special tokens, and where they stood in it."""
    shown, specials = "", []
    while text:
        found = [(text.find(token), -len(token), token) for token in tokens if token in text]
        if not found:
            return shown + text, specials
        place, _, token = min(found)
        shown += text[:place]
        specials.append((len(shown), token))
        text = text[place + len(token) :]
    return shown, specials


def parse(
    parser: AnswerParser, pieces: Sequence[tuple[str, Sequence[tuple[int, str]]]], **end: bool
) -> list[AnswerDelta]:
    deltas: list[AnswerDelta] = []
    for text, specials in pieces:
        deltas += parser.feed(text, specials)
    return merged(deltas + parser.finish(**end))


def collected(deltas: list[AnswerDelta]) -> ParsedAnswer:
    collector = AnswerCollector()
    collector.add(deltas)
    return collector.collected()


def cut(
    text: str, specials: Sequence[tuple[int, str]], places: Sequence[int]
) -> list[tuple[str, list[tuple[int, str]]]]:
    """The text and its special tokens in pieces. A token at a cut comes with the piece before it."""
    pieces, begin, rest = [], 0, list(specials)
    for end in [*sorted(set(places)), len(text)]:
        own = [(place - begin, token) for place, token in rest if place <= end]
        rest = rest[len(own) :]
        pieces.append((text[begin:end], own))
        begin = end
    return pieces
