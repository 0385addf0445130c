"""Tools and reasoning of a chat: what may be called, how the answer is taken apart, and the grammar that it follows."""

from __future__ import annotations

import json

from engine.grammar import GrammarSpec
from server.api.admit_request import Serving
from server.api.chat_prompt import template_traits
from server.config import Config
from server.errors import ApiError, bad_request
from server.parsing.answer_grammar import Tokens, Wanted, answer_grammar
from server.parsing.answer_shape import PLAIN_SHAPE, AnswerShape
from server.parsing.callable_tools import CallableTools, read_tools
from server.parsing.derive_traits import starts_thinking
from server.protocol.chat_fields import ChatBody


def callable_tools(body: ChatBody, config: Config) -> CallableTools | None:
    """The tools that may be called; None: none. Raises ApiError 400."""
    limits = config.limits
    return read_tools(
        body.tools,
        body.tool_choice,
        is_parallel=body.parallel_tool_calls is not False,
        max_tools=limits.max_tools,
        max_bytes=limits.max_tool_bytes,
    )


async def answer_shape(body: ChatBody, serving: Serving, tools: CallableTools | None, *, prompt: str) -> AnswerShape:
    """How the answer to a prompt is taken apart."""
    traits = await template_traits(serving.state, serving.tokenizer)
    shape = AnswerShape(
        answer_format=traits.answer_format,
        tools=tools.kinds if tools is not None else None,
        is_thinking=starts_thinking(prompt, traits.answer_format.reasoning),
        hidden_tokens=() if body.skip_special_tokens is False else tuple(sorted(serving.tokenizer.special_texts)),
        has_short_ids=traits.has_short_ids,
    )
    return PLAIN_SHAPE if shape.is_plain else shape


async def chat_grammar(
    body: ChatBody, serving: Serving, tools: CallableTools | None, shape: AnswerShape
) -> GrammarSpec | None:
    """The grammar of the answer, which the engine can follow; None: none. Raises ApiError 400.

    Calls are held to the schemas of their tools. Where nothing demands that (no `strict`, no call that must come) and
    it cannot be done, the model is left to itself.
    """
    content = await serving.read_grammar(body)
    wanted = Wanted(tools=tools, content=content, budget=body.reasoning_max_tokens, is_thinking=shape.is_thinking)
    tokenizer = serving.tokenizer
    tokens = Tokens(added=tokenizer.added_tokens, special=tokenizer.special_texts, ends=serving.model.eos_token_ids)
    try:
        spec = answer_grammar(shape.answer_format, wanted, tokens)
    except ValueError as error:
        param = "response_format" if content is not None else "reasoning_max_tokens"
        raise bad_request(str(error), param=param) from error
    if spec is None or spec == content:
        return spec
    try:
        return await serving.state.grammar_checker.check(
            spec, serving.model, param="tools" if tools else "response_format"
        )
    except ApiError as error:
        if content is None and body.reasoning_max_tokens is None and not (tools and tools.is_strict):
            return None
        if tools is not None and error.status == 400:
            await _find_fault(tools, serving)
        raise


async def _find_fault(tools: CallableTools, serving: Serving) -> None:
    """Raises ApiError for the first tool whose own schema cannot be followed."""
    for tool in tools.tools:
        spec = GrammarSpec("json_schema", json.dumps(tool.schema, ensure_ascii=False), is_lenient=not tool.is_strict)
        param = f"tools[{tool.place}].function.parameters"
        await serving.state.grammar_checker.check(spec, serving.model, param=param)
