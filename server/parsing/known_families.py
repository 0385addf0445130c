"""Families of models whose templates do not show how they call tools, or show less than they write: the one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from server.parsing.answer_format import CallFormat, ReasoningFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """name: for people; has: what its templates have in them, all of it; lacks: and what they have not

    adapt: the format of its calls, from what the template showed, if anything
    """

    name: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    adapt: Callable[[CallFormat | None], CallFormat | None]
    tools_in_system: bool = False


def _llama(shown: CallFormat | None) -> CallFormat:
    """A bare object, or one behind a token that the template writes for built-in tools only."""
    bare = CallFormat(is_bare=True, arguments_key="parameters")
    return replace(shown if shown is not None and shown.is_bare else bare, other_triggers=("<|python_tag|>",))


_LIST = CallFormat(section_open="<|tool_call|>", is_list=True)


def _or(other: CallFormat) -> Callable[[CallFormat | None], CallFormat]:
    return lambda shown: shown or other


HARMONY = Family(name="harmony", has=("<|channel|>", "<|message|>", "<|start|>"), adapt=lambda shown: shown)
FAMILIES: tuple[Family, ...] = (
    HARMONY,
    Family(name="Llama 3", has=("<|python_tag|>", "<|start_header_id|>"), adapt=_llama),
    Family(
        name="Phi-4-mini",
        has=("<|tool|>", "<|/tool|>"),
        lacks=("tool_calls",),
        adapt=_or(replace(_LIST, section_close="<|/tool_call|>", other_triggers=("functools",))),
        tools_in_system=True,
    ),
    Family(
        name="Granite 3", has=("<|tool_call|>", "<|start_of_role|>"), adapt=_or(_LIST)
    ),
    Family(
        name="Mistral",
        has=("[TOOL_CALLS]",),
        lacks=("<|im_start|>",),
        adapt=_or(CallFormat(section_open="[TOOL_CALLS] ", is_list=True)),
    ),
)  # fmt: skip


def family_of(template: str) -> Family | None:
    """The first whose signs are in the template."""
    for family in FAMILIES:
        if all(sign in template for sign in family.has) and not any(sign in template for sign in family.lacks):
            return family
    return None


_PAIRS = (
    ReasoningFormat(open="<think>\n", close="\n</think>\n\n"),
    ReasoningFormat(open="[THINK]", close="[/THINK]"),
    ReasoningFormat(open="<|channel>thought\n", close="<channel|>"),
    ReasoningFormat(open="<seed:think>", close="</seed:think>"),
    ReasoningFormat(open="<|START_THINKING|>", close="<|END_THINKING|>"),
    ReasoningFormat(open="<thinking>", close="</thinking>"),
    ReasoningFormat(open="<reasoning>", close="</reasoning>"),
)


def reasoning_pairs(template: str) -> Iterator[ReasoningFormat]:
    """The known pairs of markers of which the template has at least one."""
    for pair in _PAIRS:
        if pair.open.strip() in template or pair.close.strip() in template:
            if "<response>" in template:  # Granite's answers stand in tags of their own
                pair = replace(pair, answer_open="<response>", answer_close="</response>")
            yield pair
