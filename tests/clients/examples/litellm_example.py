"""litellm: as an OpenAI provider and as an Anthropic one."""

import litellm
from checks import BIRD, KEY, MODEL, QUESTION, URL, WEATHER, is_bird, is_weather, run

OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "timeout": 300, "num_retries": 0}
ANTHROPIC = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": KEY, "timeout": 300, "num_retries": 0}
SAY = [{"role": "user", "content": "Name a bird."}]
FUNCTION = {"name": "weather", "description": "tells the weather of a city", "parameters": WEATHER}
TOOLS = [{"type": "function", "function": FUNCTION}]


def text() -> None:
    for provider in (OPENAI, ANTHROPIC):
        assert litellm.completion(**provider, messages=SAY, max_tokens=20).choices[0].message.content


def streaming() -> None:
    for provider in (OPENAI, ANTHROPIC):
        chunks = litellm.completion(**provider, messages=SAY, max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def history() -> None:
    said = [*SAY, {"role": "assistant", "content": "A crow."}, {"role": "user", "content": "Another."}]
    for provider in (OPENAI, ANTHROPIC):
        assert litellm.completion(**provider, messages=said, max_tokens=20).choices[0].message.content


def tools() -> None:
    for provider in (OPENAI, ANTHROPIC):
        messages = [{"role": "user", "content": QUESTION}]
        answer = litellm.completion(**provider, messages=messages, max_tokens=100, tools=TOOLS, tool_choice="required")
        [call, *_] = answer.choices[0].message.tool_calls
        assert is_weather(call.function.arguments)


def structured_output() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "bird", "schema": BIRD, "strict": True}}
    answer = litellm.completion(**OPENAI, messages=SAY, max_tokens=100, response_format=wanted)
    assert is_bird(answer.choices[0].message.content)


def embeddings() -> None:
    assert len(litellm.embedding(**OPENAI, input=["a bird", "a plane"]).data) == 2


run({
    "text": text, "streaming": streaming, "history": history, "tools": tools, "structured output": structured_output,
    "embeddings": embeddings,
})  # fmt: skip
