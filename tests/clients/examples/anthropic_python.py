"""The anthropic package: messages and their tokens."""

import anthropic
from checks import BIRD, KEY, MODEL, QUESTION, URL, WEATHER, is_bird, is_weather, run

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
GREEDY = {"temperature": 0}  # no argument of the client any more
SAY = [{"role": "user", "content": "Name a bird."}]
TOOL = {"name": "weather", "description": "tells the weather of a city", "input_schema": WEATHER}


def text() -> None:
    answer = client.messages.create(model=MODEL, max_tokens=20, messages=SAY, system="Be brief.", extra_body=GREEDY)
    assert answer.content[0].text
    counted = client.messages.count_tokens(model=MODEL, messages=SAY, system="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def streaming() -> None:
    whole = client.messages.create(model=MODEL, max_tokens=20, messages=SAY, extra_body=GREEDY)
    with client.messages.stream(model=MODEL, max_tokens=20, messages=SAY, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def history() -> None:
    first = client.messages.create(model=MODEL, max_tokens=20, messages=SAY)
    messages = [*SAY, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Another."}]
    assert client.messages.create(model=MODEL, max_tokens=20, messages=messages).content[0].text


def tools() -> None:
    messages = [{"role": "user", "content": QUESTION}]
    request = {"model": MODEL, "max_tokens": 100, "tools": [TOOL]}
    with client.messages.stream(**request, messages=messages, tool_choice={"type": "any"}) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    [call, *_] = [block for block in answer.content if block.type == "tool_use"]
    assert is_weather(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**request, messages=messages).content


def structured_output() -> None:
    wanted = {"format": {"type": "json_schema", "schema": BIRD}}
    answer = client.messages.create(model=MODEL, max_tokens=100, messages=SAY, extra_body={"output_config": wanted})
    assert is_bird(answer.content[0].text)


def errors() -> None:
    try:
        client.messages.create(model="nothing-like-it", max_tokens=5, messages=SAY)
    except anthropic.NotFoundError as error:
        found = error.body["error"]["type"]
    else:
        raise AssertionError("no error came")
    assert found == "not_found_error"


run({
    "text": text, "streaming": streaming, "history": history, "tools": tools, "structured output": structured_output,
    "errors": errors,
})  # fmt: skip
