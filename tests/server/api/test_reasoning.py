"""Reasoning of chats: told apart from the answer, whole and streamed; its budget; and that of earlier turns."""

from __future__ import annotations

import json

import openai
import pytest

from tests.support.chat_templates import TEMPLATES
from tests.support.server_world import World
from tests.support.tool_world import WEATHER, openai_client, prompt_of, tool_world

ASK = [{"role": "user", "content": "2 + 2?"}]
HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>", "<|return|>")
SPOKEN = {  # by template: what a model writes, which tokens are special, and what it has thought and said
    "qwen": ("<think>\nadd them\n</think>\n\nFour.", (), "add them", "Four."),
    "deepseek": ("add them\n</think>\n\nFour.", (), "add them", "Four."),
    "mistral args": ("[THINK]add them[/THINK]Four.", ("[THINK]", "[/THINK]"), "add them", "Four."),
    "harmony": (
        "<|channel|>analysis<|message|>add them<|end|><|start|>assistant<|channel|>final<|message|>Four.",
        HARMONY_TOKENS, "add them", "Four.",
    ),
    "granite": ("<think>add them</think><response>Four.</response>", (), "add them", "Four."),
    "gemma": ("<|channel>thought\nadd them<channel|>Four.", ("<|channel>", "<channel|>"), "add them", "Four."),
    "glm": ("\n<think>add them</think>\nFour.", (), "add them", "Four."),
    "plain": ("<think>is this</think>Four.", (), "", "<think>is this</think>Four."),
}  # fmt: skip


def ask(sdk: openai.OpenAI, *, stream: bool = False, **more: object) -> tuple[str, str, str | None]:
    """What was thought, what was said, and the finish reason."""
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 300} | more
    if not stream:
        choice = sdk.chat.completions.create(**fields).choices[0]
        extra = choice.message.model_extra
        assert extra.get("reasoning_content") == extra.get("reasoning")
        return extra.get("reasoning_content") or "", choice.message.content or "", choice.finish_reason
    thought, said, finish = "", "", None
    for chunk in sdk.chat.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        extra = choice.delta.model_extra
        assert extra.get("reasoning_content") == extra.get("reasoning")
        assert not (extra.get("reasoning") and choice.delta.content)
        assert not (extra.get("reasoning") and said), "reasoning comes first"
        thought += extra.get("reasoning") or ""
        said += choice.delta.content or ""
        finish = choice.finish_reason or finish
    return thought, said, finish


@pytest.mark.parametrize("shape", SPOKEN)
def test_what_a_model_thinks_is_told_apart(shape: str) -> None:
    text, special, thought, said = SPOKEN[shape]
    with tool_world(TEMPLATES[shape], special=special) as world, openai_client(world) as sdk:
        world.engine.say(text)
        for step_size in (1, 4, 1000):
            world.engine.step_size = step_size
            assert ask(sdk) == ask(sdk, stream=True) == (thought, said, "stop")


def test_reasoning_can_be_left_out_and_never_leaks() -> None:
    with tool_world(TEMPLATES["qwen"]) as world, openai_client(world) as sdk:
        world.engine.say("<think>\nsecret <tool_call>\n</think>\n\nFour.")
        for stream in (False, True):
            assert ask(sdk, stream=stream, extra_body={"include_reasoning": False}) == ("", "Four.", "stop")
        world.engine.say('<think>\nsecret\n</think>\n\n<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
        message = sdk.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER]).choices[0].message
        assert (message.content, message.tool_calls[0].function.arguments) == (None, "{}")


def test_thinking_that_is_never_over_is_no_content() -> None:
    with tool_world(TEMPLATES["deepseek"]) as world, openai_client(world) as sdk:
        world.engine.say("on and on")
        for stream in (False, True):
            assert ask(sdk, stream=stream, max_tokens=2)[1:] == ("", "length")


def test_a_switch_of_the_template_turns_it_off() -> None:
    with tool_world(TEMPLATES["qwen"]) as world, openai_client(world) as sdk:
        world.engine.say("Four.")
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert ask(sdk, extra_body=off) == ("", "Four.", "stop")
        assert prompt_of(world).endswith("<think>\n\n</think>\n\n")
        ask(sdk, reasoning_effort="none")
        assert prompt_of(world).endswith("<think>\n\n</think>\n\n")
        ask(sdk, reasoning_effort="high")
        assert prompt_of(world).endswith("assistant\n")


def test_the_effort_is_told_to_a_template_that_asks_for_it() -> None:
    with tool_world(TEMPLATES["harmony"], special=HARMONY_TOKENS) as world, openai_client(world) as sdk:
        world.engine.say("<|channel|>final<|message|>Four.")
        assert ask(sdk, reasoning_effort="low") == ("", "Four.", "stop")
        assert "Reasoning: low" in prompt_of(world)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("shape", ["qwen", "harmony", "mistral args", "gemma"])
def test_earlier_reasoning_goes_back_in_the_form_that_the_template_reads(shape: str, name: str) -> None:
    messages = [*ASK, {"role": "assistant", "content": "Four.", name: "add them"}, {"role": "user", "content": "Sure?"}]
    with tool_world(TEMPLATES[shape], special=SPOKEN[shape][1]) as world, openai_client(world) as sdk:
        world.engine.say("Yes.")
        ask(sdk, messages=messages)
        text = SPOKEN[shape][0]
        opened = text.partition("add them")[0].strip()
        assert (
            f"{opened}add them" in prompt_of(world).replace("\n", "")
            if shape == "qwen"
            else "add them" in prompt_of(world)
        )
        assert "Four." in prompt_of(world)


def lark_of(world: World) -> str:
    return json.loads(world.engine.requests[-1].params.grammar.text)[0]["lark_grammar"]


def test_a_budget_is_in_the_grammar_and_needs_one_token_to_end_with() -> None:
    with tool_world(TEMPLATES["deepseek"], added=("<think>", "</think>")) as world, openai_client(world) as sdk:
        world.engine.say("x\n</think>\n\nFour.")
        ask(sdk, extra_body={"reasoning_max_tokens": 7})
        assert "{0,7}" in lark_of(world)
    with tool_world(TEMPLATES["deepseek"]) as world, openai_client(world) as sdk:
        with pytest.raises(openai.BadRequestError, match="one token") as caught:
            ask(sdk, extra_body={"reasoning_max_tokens": 7})
        assert caught.value.param == "reasoning_max_tokens"
    with tool_world(TEMPLATES["plain"]) as world, openai_client(world) as sdk:
        world.engine.say("Four.")
        assert ask(sdk, extra_body={"reasoning_max_tokens": 7}) == ("", "Four.", "stop")
        assert world.engine.requests[-1].params.grammar is None


def test_a_structured_answer_comes_behind_the_reasoning() -> None:
    with tool_world(TEMPLATES["deepseek"], added=("<think>", "</think>")) as world, openai_client(world) as sdk:
        world.engine.say('x\n</think>\n\n{"sum": 4}')
        thought, said, _ = ask(sdk, response_format={"type": "json_object"})
        assert (thought, json.loads(said)) == ("x", {"sum": 4})
        assert lark_of(world).startswith("start: think body")
