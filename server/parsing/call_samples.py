"""Reading the format of calls off samples: what a template wrote of calls whose name, keys and values are known."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from server.parsing.answer_format import CallFormat, CallKind

NAMES = ("qz_alpha", "qz_beta")
DECLARED = "qz_declared"
ARGUMENTS = {"qzkey": "qzvalue", "qznumber": 17}
LONG_IDS = ("call_qzalphaid", "call_qzbetaid")
SHORT_IDS = ("qzalpha01", "qzbeta002")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Unit:
    """One call in a sample: where its text begins and ends, and what was read off it."""

    begin: int
    end: int
    calls: CallFormat


def read_calls(one: str, two: str | None) -> CallFormat | None:
    """The format of calls, from what a template wrote of one call and of two, without what stands around the turn.

    None where it cannot be told.
    """
    unit = _find_unit(one, 0)
    if unit is None:
        return None
    before, after = one[: unit.begin], one[unit.end :]
    is_list = unit.calls.kind == "json" and before.rstrip().endswith("[") and after.lstrip().startswith("]")
    if is_list:
        before, after = before.rstrip()[:-1], after.lstrip()[1:]
    calls = replace(unit.calls, is_list=is_list)
    middle = None if two is None else _middle(two)
    if is_list:
        return replace(calls, section_open=before, section_close=after, separator=middle or "")
    if middle is None:  # one call at a time: nothing tells a section from a call
        return _checked(replace(calls, call_open=before, call_close=after))
    call_close = _without_half_tag(common_prefix(after, middle))
    call_open = _from_tag(_common_suffix(before, middle), before)
    if len(call_close) + len(call_open) > len(middle):  # they share what is left of it
        call_close = middle[: len(middle) - len(call_open)]
    return _checked(
        replace(
            calls,
            section_open=before.removesuffix(call_open),
            call_open=call_open,
            separator=middle[len(call_close) : len(middle) - len(call_open)],
            call_close=call_close,
            section_close=after.removeprefix(call_close),
        )
    )


def _without_half_tag(text: str) -> str:
    """Up to a tag at its end that is not closed."""
    return text[: text.rfind("<")] if text.rfind("<") > text.rfind(">") else text


def _from_tag(end: str, text: str) -> str:
    """The end of a text, from the first tag on, if it begins in the middle of one."""
    begin = text.removesuffix(end)
    return end[end.find(">") + 1 :] if begin.rfind("<") > begin.rfind(">") else end


def _checked(calls: CallFormat) -> CallFormat:
    """A format whose calls nothing begins is that of a bare object, if it is one."""
    if calls.opening.strip():
        return calls
    return replace(calls, section_open="", call_open="", call_close="", section_close="", is_bare=True)


def _middle(two: str) -> str | None:
    first = _find_unit(two, 0)
    second = None if first is None else _find_unit(two, first.end, number=1)
    return None if first is None or second is None else two[first.end : second.begin]


def _find_unit(text: str, start: int, *, number: int = 0) -> Unit | None:
    name = text.find(NAMES[number], start)
    if name < 0:
        return None
    return _json_unit(text, start, name, number) or _named_unit(text, name, number)


def _json_unit(text: str, start: int, name: int, number: int) -> Unit | None:
    """An object that has the name and the arguments in it: the outermost."""
    place = text.find("{", start, name)
    while place >= 0:
        found = _decode(text, place)
        if found is not None:
            value, end = found
            inner = value.get("function")
            holder = inner if isinstance(inner, dict) else value
            keys = {_key_of(held, number): key for key, held in holder.items()}
            if "name" in keys and "arguments" in keys:
                calls = CallFormat(kind="json", name_key=keys["name"], arguments_key=keys["arguments"])
                return Unit(place, end, calls)
        place = text.find("{", place + 1, name)
    return None


def _key_of(value: object, number: int) -> str:
    if value == NAMES[number]:
        return "name"
    if isinstance(value, str) and value.startswith("{"):
        found = _decode(value, 0)
        value = None if found is None else found[0]
    return "arguments" if value == ARGUMENTS else ""


def _named_unit(text: str, name: int, number: int) -> Unit | None:
    behind = name + len(NAMES[number])
    for read in (_object_behind, _loose_behind, _tags_behind):
        unit = read(text, name, behind)
        if unit is not None:
            return unit
    return None


def _object_behind(text: str, name: int, behind: int) -> Unit | None:
    place = text.find("{", behind)
    while place >= 0:
        found = _decode(text, place)
        if found is not None and found[0] == ARGUMENTS:
            name_end, id_open = _split_id(text[behind:place])
            return Unit(name, found[1], CallFormat(kind="named", name_end=name_end, id_open=id_open))
        place = text.find("{", place + 1, text.find("qzkey", behind))
    return None


def _split_id(between: str) -> tuple[str, str]:
    """What ends the name, and what begins the id, if there is one between name and arguments."""
    for call_id in (*LONG_IDS, *SHORT_IDS):
        before, is_there, after = between.partition(call_id)
        if is_there:
            return after, before
    return between, ""


def _loose_behind(text: str, name: int, behind: int) -> Unit | None:
    """`{qzkey:"qzvalue",qznumber:17}`, whatever stands for the quotes."""
    key, value = text.find("qzkey:", behind), text.find("qzvalue", behind)
    end = text.find("}", value)
    if key < 0 or value < 0 or end < 0 or text[behind:key].strip() not in ("{", ":{", "({"):
        return None
    quote = text[key + len("qzkey:") : value].strip()
    head, brace, _ = text[behind:key].partition("{")
    return Unit(name, end + 1, CallFormat(kind="loose", name_end=head, quote=quote)) if quote and brace else None


def _tags_behind(text: str, name: int, behind: int) -> Unit | None:
    key, value = text.find("qzkey", behind), text.find("qzvalue", behind)
    key_2 = text.find("qznumber", behind)
    value_2 = text.find("17", key_2)
    if not behind <= key < value < key_2 < value_2:
        return None
    before_key, key_close = text[behind:key], text[key + len("qzkey") : value]
    between = text[value + len("qzvalue") : key_2]
    if not key_close.strip() or text[key_2 + len("qznumber") : value_2] != key_close:
        return None
    key_open = _common_suffix(before_key, between)
    key_open = key_open[max(key_open.rfind("<"), 0) :]
    value_close = between[: len(between) - len(key_open)]
    if not key_open.strip() or not value_close.strip():
        return None
    end = value_2 + len("17")
    closing = value_close if text.startswith(value_close, end) else value_close.rstrip()
    if not text.startswith(closing, end):
        return None
    name_end = before_key[: len(before_key) - len(key_open)]
    kind: CallKind = "tagged"
    calls = CallFormat(kind=kind, name_end=name_end, key_open=key_open, key_close=key_close, value_close=value_close)
    return Unit(name, end + len(closing), calls)


def _decode(text: str, place: int) -> tuple[dict[str, object], int] | None:
    try:
        value, end = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def _common_suffix(one: str, other: str) -> str:
    return common_prefix(one[::-1], other[::-1])[::-1]


def common_prefix(one: str, other: str) -> str:
    """What both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
