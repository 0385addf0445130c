"""A process that renders chat templates: `python -m server.text.template_worker`, started by `chat_renderer`.

A template is a program, and what clients send is its input: nested loops over a conversation may take for ever, and one
multiplication may ask for gigabytes. Here both meet limits, and where those do not help, the process is killed and
nothing is lost with it. It reads requests from its standard input and ends with it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

import msgspec

from server.text.worker_limits import frame, limited, read_frame

Plain = str | int | float | bool | None
_PROBE = "peregrine-probe"
_MOST_KNOWN = 16  # templates
_LONGEST_REASON = 1000  # characters; a template may quote all that it was given
_WANT_PARTS: dict[str, bool] = {}  # by template


class Render(msgspec.Struct, kw_only=True):
    """A conversation and the template to render it with. Limits: processor seconds, characters, bytes of memory."""

    template: str
    turns: list[dict[str, object]]
    variables: dict[str, Plain]
    tools: list[dict[str, object]] | None = None
    add_generation_prompt: bool
    continue_final_message: bool
    max_seconds: float
    max_characters: int
    max_bytes: int


class Rendered(msgspec.Struct):
    """text: None where the template, or a limit, refused the conversation; then why, and which of them it was."""

    text: str | None
    reason: str = ""
    was_limit: bool = False


class TimeIsUp(BaseException):
    """The processor time of a rendering is used up. Not an Exception, so that no template or library catches it."""


def render(request: Render, render_template: Callable[..., tuple[list[str], object]]) -> Rendered:
    """Renders a conversation within the limits. An exception of the template becomes the reason of the refusal."""
    try:
        with limited(request.max_seconds, request.max_bytes):
            texts = _rendered(request, render_template)
    except TimeIsUp:
        return Rendered(None, f"it took more than {request.max_seconds:g} s of processor time", was_limit=True)
    except MemoryError:
        return Rendered(None, f"it took more than {request.max_bytes >> 20} MiB of memory", was_limit=True)
    except RecursionError:
        return Rendered(None, "it called itself too often")
    except _template_errors() as error:
        return Rendered(None, _as_unicode(str(error).split("Final message to continue:")[0][:_LONGEST_REASON]))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if len(texts[0]) > request.max_characters:
        return Rendered(None, f"it made {len(texts[0])} characters, more than {request.max_characters}")
    return Rendered(_as_unicode(texts[0]))


def _rendered(request: Render, render_template: Callable[..., tuple[list[str], object]]) -> list[str]:
    signal.setitimer(signal.ITIMER_VIRTUAL, request.max_seconds)
    turns = [_in_parts(turn) for turn in request.turns] if _wants_parts(request, render_template) else request.turns
    texts, _ = render_template(
        [turns],
        tools=request.tools,
        chat_template=request.template,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        **request.variables,
    )
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return texts


def _as_unicode(text: str) -> str:
    """The text with lone surrogates replaced, which a template may write and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _template_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which a template refuses a conversation that it does not fit."""
    from jinja2 import TemplateError

    return TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError


def _in_parts(turn: dict[str, object]) -> dict[str, object]:
    if not isinstance(turn["content"], str):
        return dict(turn)
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _wants_parts(request: Render, render_template: Callable[..., tuple[list[str], object]]) -> bool:
    """Whether the template looks for a message's text in a list of parts, as those of some multimodal models do.

    Such a template makes nothing of a text: it is shown one, once, and then the same in a part.
    """
    wants = _WANT_PARTS.get(request.template)
    if wants is None:
        turn: dict[str, object] = {"role": "user", "content": _PROBE}
        shown = []
        for probe in (turn, _in_parts(turn)):
            try:
                texts, _ = render_template([[probe]], chat_template=request.template, **request.variables)
                shown.append(_PROBE in texts[0] and "'type'" not in texts[0])
            except _template_errors():  # it wants another conversation than this; the real one will show what
                shown.append(False)
        wants = shown == [False, True]
        if len(_WANT_PARTS) >= _MOST_KNOWN:
            _WANT_PARTS.clear()
        _WANT_PARTS[request.template] = wants
    return wants


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TimeIsUp


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGVTALRM, _time_is_up)
    decoder = msgspec.msgpack.Decoder(Render)
    while (data := read_frame(requests)) is not None:
        answers.write(frame(render(decoder.decode(data), render_jinja_template)))
        answers.flush()


if __name__ == "__main__":
    main()
