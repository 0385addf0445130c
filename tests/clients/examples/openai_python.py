"""The openai package: chat, responses and embeddings."""

from checks import BIRD, KEY, MODEL, QUESTION, URL, WEATHER, is_bird, is_weather, run
from openai import NotFoundError, OpenAI

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=300)
SAY = [{"role": "user", "content": "Name a bird."}]
FUNCTION = {"name": "weather", "description": "tells the weather of a city", "parameters": WEATHER}
TOOL = {"type": "function", "function": FUNCTION}


def text() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content
    assert client.responses.create(model=MODEL, input="Name a bird.", max_output_tokens=20).output_text


def streaming() -> None:
    whole = client.responses.create(model=MODEL, input="Name a bird.", max_output_tokens=20, temperature=0)
    with client.responses.stream(model=MODEL, input="Name a bird.", max_output_tokens=20, temperature=0) as stream:
        events = list(stream)
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{whole.status}"
    assert events[-1].response.output_text == whole.output_text
    with client.chat.completions.stream(model=MODEL, messages=SAY, max_tokens=20) as chat:
        assert [event.type for event in chat][-1] in ("content.done", "chunk")


def history() -> None:
    first = client.responses.create(model=MODEL, input="Name a bird.", max_output_tokens=20)
    follow = [{"role": "user", "content": "Name a bird."}, *first.output, {"role": "user", "content": "Another."}]
    assert client.responses.create(model=MODEL, input=follow, max_output_tokens=20).output_text
    second = client.responses.create(model=MODEL, input="Another.", previous_response_id=first.id, max_output_tokens=20)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)


def tools() -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=100
    )
    [call, *_] = chat.choices[0].message.tool_calls
    assert is_weather(call.function.arguments)
    messages += [chat.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=20).choices
    tool = {"type": "function", **FUNCTION}
    answer = client.responses.create(
        model=MODEL, input=QUESTION, tools=[tool], tool_choice="required", max_output_tokens=100
    )
    [call, *_] = [item for item in answer.output if item.type == "function_call"]
    assert is_weather(call.arguments)
    items = [{"role": "user", "content": QUESTION}, *answer.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(model=MODEL, input=items, tools=[tool], max_output_tokens=20).output


def structured_output() -> None:
    schema = {"name": "bird", "schema": BIRD, "strict": True}
    chat = client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=100, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert is_bird(chat.choices[0].message.content)
    text = {"format": {"type": "json_schema", **schema}}
    answer = client.responses.create(model=MODEL, input="Name a bird.", text=text, max_output_tokens=100)
    assert is_bird(answer.output_text)


def embeddings() -> None:
    answer = client.embeddings.create(model=MODEL, input=["a bird", "a plane"])
    assert len(answer.data) == 2
    assert abs(sum(value * value for value in answer.data[0].embedding) - 1) < 1e-4


def errors() -> None:
    try:
        client.responses.create(model="nothing-like-it", input="x")
    except NotFoundError as error:
        found = error.code
    else:
        raise AssertionError("no error came")
    assert found == "model_not_found"


run({
    "text": text, "streaming": streaming, "history": history, "tools": tools, "structured output": structured_output,
    "embeddings": embeddings, "errors": errors,
})  # fmt: skip
