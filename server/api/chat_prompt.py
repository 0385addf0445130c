"""The prompt of a chat: messages and tools as the model's chat template makes a text of them."""

from __future__ import annotations

from server.errors import bad_request
from server.parsing.conversation import ToolObject, conversation, shown_tools
from server.parsing.template_probe import probe_template
from server.parsing.template_traits import TemplateTraits
from server.protocol.chat_fields import ChatBody, TokenizeBody
from server.state import ServerState
from server.text.template_worker import Plain
from server.text.tokenizer import Tokenizer

NO_THINKING = ("none", "minimal")  # values of reasoning_effort


async def template_traits(state: ServerState, tokenizer: Tokenizer) -> TemplateTraits:
    """What the served model's template does with tools and reasoning; found out once, by rendering conversations."""
    template = tokenizer.chat_template
    if template is None:
        return TemplateTraits()
    known = state.template_traits.get(template)
    if known is not None:
        return known
    state.template_traits[template] = await probe_template(tokenizer, state.chat_renderer)
    return state.template_traits[template]


async def render_messages(
    body: ChatBody | TokenizeBody, state: ServerState, tokenizer: Tokenizer, *, tools: list[ToolObject]
) -> str:
    """The prompt that the model's template makes of the body's messages. Raises ApiError 400.

    tools: those that are described to the model
    """
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt is not False
    if continues and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    variables = _variables(body)
    traits = await template_traits(state, tokenizer)
    try:
        return await tokenizer.render_chat(
            state.chat_renderer,
            conversation(body.messages or (), tools, traits),
            add_generation_prompt=generates and not continues,
            continue_final_message=continues,
            variables={**_effort(body, traits), **variables},
            tools=shown_tools(tools, traits),
        )
    except ValueError as error:
        raise bad_request(str(error), param="messages") from error


def _variables(body: ChatBody | TokenizeBody) -> dict[str, Plain]:
    variables: dict[str, Plain] = {}
    for name, value in (body.chat_template_kwargs or {}).items():
        if isinstance(value, list | dict):
            message = f"chat_template_kwargs: {name[:100]!r} must be a plain value, not a list or an object"
            raise bad_request(message, param="chat_template_kwargs")
        variables[name] = value
    return variables


def _effort(body: ChatBody | TokenizeBody, traits: TemplateTraits) -> dict[str, Plain]:
    """What reasoning_effort means to the template: a level, or, where it knows only on and off, that."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    variables: dict[str, Plain] = {"reasoning_effort": effort}
    if "reasoning_effort" not in traits.switches:
        for switch in traits.switches & {"enable_thinking", "thinking"}:
            variables[switch] = effort not in NO_THINKING
    return variables
