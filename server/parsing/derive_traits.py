"""Reading a chat template's traits off what it renders: small conversations go in, with names and values that nothing
else has, and where these come out shows the format.

A template is a program, and nothing else says what it writes. What it refuses is an answer, too. A few families write
what their templates do not show; those are in `known_families`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import product

from server.parsing.answer_format import AnswerFormat, CallFormat, FormatSource, ReasoningFormat
from server.parsing.call_samples import ARGUMENTS, DECLARED, LONG_IDS, NAMES, SHORT_IDS, common_prefix, read_calls
from server.parsing.known_families import HARMONY, family_of, reasoning_pairs
from server.parsing.template_traits import FALLBACK_CALLS, TemplateTraits

USER, SAID, THOUGHT, SYSTEM, RESULT = "qzuser", "qzsaid", "qzthought", "qzsystem", "qzresult"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MARKER = re.compile(r"\s*(<[^<>]+>|\[[^\[\]]+\])\s*")
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "think")
Turn = dict[str, object]
ASKED: Turn = {"role": "user", "content": USER}
TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": DECLARED,
        "description": "a probe",
        "parameters": {"type": "object", "properties": {"qzparameter": {"type": "string"}}, "required": []},
    },
}


class EndlessError(Exception):
    """A limit has ended a rendering: this template must not be asked again."""


Show = Callable[..., Awaitable[str | None]]
"""`await show(turns, tools=..., add_generation_prompt=...)`: what the template makes of it, None where it refuses.
Raises EndlessError."""


async def derive_traits(template: str, show: Show) -> TemplateTraits:
    """What can be seen of the template. Never raises: where nothing shows, it has neither tools nor reasoning."""
    try:
        return await _derive(template, show)
    except EndlessError:
        return TemplateTraits(notes=("a limit ended its rendering",))


async def _derive(template: str, show: Show) -> TemplateTraits:
    shown = await show([ASKED], tools=[TOOL], add_generation_prompt=True)
    told = await show([{"role": "system", "content": SYSTEM}, ASKED])
    traits = TemplateTraits(
        declares_tools=DECLARED in (shown or ""),
        shows_system=SYSTEM in (told or ""),
        switches=frozenset(name for name in SWITCHES if name in template),
    )
    family = family_of(template)
    calls, traits = await _with_calls(traits, show)
    traits = await _with_results(traits, show)
    if family is HARMONY:
        answer_format = AnswerFormat(name="harmony", source="override", is_harmony=True)
        return replace(traits, answer_format=answer_format, reasoning_keys=("thinking",))
    traits = await _with_reasoning(traits, template, show)
    reasoning = traits.answer_format.reasoning
    source: FormatSource = "template"
    if family is not None:
        adapted = family.adapt(calls)
        calls, source = adapted, "template" if adapted is calls else "override"
        traits = replace(traits, tools_in_system=family.tools_in_system)
    if calls is None or not (traits.declares_tools or traits.tools_in_system):
        calls, source = FALLBACK_CALLS, "fallback"
    name = family.name if family is not None else _name(calls)
    if source == "fallback":
        name = "tool_call tags, by the server's instructions"
    answer_format = AnswerFormat(name=name, source=source, reasoning=reasoning, calls=calls)
    return replace(traits, answer_format=answer_format)


def _name(calls: CallFormat) -> str:
    opening = " ".join(calls.opening.split()) or "no marker"
    return f"{calls.kind} behind {opening}"


async def _with_calls(traits: TemplateTraits, show: Show) -> tuple[CallFormat | None, TemplateTraits]:
    """Finds the form in which the template takes calls, by trying the forms there are, and reads what it writes."""
    start = await show([ASKED], tools=[TOOL]) or ""
    said = await show([ASKED, {"role": "assistant", "content": SAID}], tools=[TOOL]) or ""
    forms = product((False, True), (False, True), (True, False), (False, True))
    for has_result, has_short_ids, calls_without_content, arguments_are_text in forms:
        tried = replace(
            traits,
            shows_calls=True,
            has_short_ids=has_short_ids,
            calls_without_content=calls_without_content,
            arguments_are_text=arguments_are_text,
        )
        one = await show(_called(tried, 1, has_result=has_result), tools=[TOOL])
        if one is None or not _is_shown(one):
            continue
        two = await show(_called(tried, 2, has_result=has_result), tools=[TOOL])
        if two is not None and NAMES[1] not in two:
            two = None
        calls = read_calls(_own_part(one, start, said), None if two is None else _own_part(two, start, said))
        return calls, tried
    return None, traits


def _called(traits: TemplateTraits, num_calls: int, *, has_result: bool) -> list[Turn]:
    ids = SHORT_IDS if traits.has_short_ids else LONG_IDS
    arguments = json.dumps(ARGUMENTS) if traits.arguments_are_text else ARGUMENTS
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name in list(zip(ids, NAMES, strict=True))[:num_calls]
    ]
    content = None if traits.calls_without_content else ""
    turns: list[Turn] = [ASKED, {"role": "assistant", "content": content, "tool_calls": calls}]
    for call_id, name in list(zip(ids, NAMES, strict=True))[: num_calls if has_result else 0]:
        turns.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": RESULT})
    return turns


def _is_shown(text: str) -> bool:
    """Whether a call is there as a model would write it: neither as Python nor as JSON in JSON."""
    if NAMES[0] not in text or "qzvalue" not in text or "17" not in text:
        return False
    behind = text[text.find(USER) :]
    return not any(wrong in behind for wrong in ("'qzkey'", '\\"qzkey', "None"))


def _own_part(text: str, start: str, said: str) -> str:
    """What the model itself would have written: without the conversation before, the turn's head and its end."""
    begin = len(common_prefix(text, start))
    head, is_there, end = said[len(common_prefix(said, start)) :].partition(SAID)
    own = text[begin:]
    if not is_there:
        return own
    own = own[len(common_prefix(own, head)) :]
    place = own.find(end.strip()) if end.strip() else -1
    first = end.strip().split("\n")[0]
    if place < 0 and first:
        place = own.find(first)
    own = own[:place] if place >= 0 else own
    return own.partition(RESULT)[0]


async def _with_results(traits: TemplateTraits, show: Show) -> TemplateTraits:
    if traits.shows_calls:
        turns = _called(traits, 1, has_result=True)
    else:
        turns = [ASKED, {"role": "assistant", "content": SAID}, {"role": "tool", "name": NAMES[0], "content": RESULT}]
    text = await show(turns, tools=[TOOL])
    return replace(traits, shows_results=text is not None and RESULT in text)


async def _with_reasoning(traits: TemplateTraits, template: str, show: Show) -> TemplateTraits:
    """What stands around reasoning that the template shows again; or a known pair, best one that the prompt opens."""
    turn: Turn = {"role": "assistant", "content": SAID, **{key: key + THOUGHT for key in REASONING_KEYS}}
    text = await show([ASKED, turn]) or ""
    keys = tuple(key for key in REASONING_KEYS if key + THOUGHT in text)
    in_parts = False
    if not keys and "thinking" in template:
        parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": SAID}]
        text = await show([ASKED, {"role": "assistant", "content": parts}]) or ""
        in_parts = THOUGHT in text and "'thinking'" not in text
    traits = replace(traits, reasoning_keys=keys, reasoning_in_parts=in_parts)
    reasoning = None
    if keys or in_parts:
        reasoning = _around(text, keys[0] + THOUGHT if keys else THOUGHT, await show([ASKED]) or "")
    if reasoning is None:
        prompt = await show([ASKED], add_generation_prompt=True) or ""
        reasoning = next((pair for pair in reasoning_pairs(template) if _is_opened(prompt, pair)), None)
        reasoning = reasoning or next(reasoning_pairs(template), None)
    return replace(traits, answer_format=replace(traits.answer_format, reasoning=reasoning))


def _around(text: str, thought: str, start: str) -> ReasoningFormat | None:
    """The markers around a thought. start: what the template writes of the conversation before it

    The turn has a head of its own before them; so the last marker counts, with what stands behind it.
    """
    before, _, after = text.partition(thought)
    head = before[len(common_prefix(before, start)) :]
    opened = head[max(head.rfind("<"), head.rfind("[")) :]
    between, is_there, _ = after.partition(SAID)
    close = _MARKER.match(between)
    if not is_there or close is None or not opened.startswith(("<", "[")):
        return None
    return ReasoningFormat(open=opened, close=close[0], answer_open=between[close.end() :].strip())


def _is_opened(prompt: str, pair: ReasoningFormat) -> bool:
    return prompt.rstrip().endswith(pair.open.strip())


def starts_thinking(prompt: str, reasoning: ReasoningFormat | None) -> bool:
    """Whether a prompt ends inside of reasoning, so that the answer begins there."""
    return reasoning is not None and _is_opened(prompt, reasoning)
