"""Readers of event streams that hold each API to its grammar: what is out of order, missing or told twice fails."""

from __future__ import annotations

import json

ENDS = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}
FIELD = {"message": "output_text", "reasoning": "reasoning_text"}


def read_named_events(body: str) -> list[dict]:
    """Server-sent events that say their type twice: on a line of their own, and inside."""
    assert body.endswith("\n\n"), body[-200:]
    events = []
    for text in body[:-2].split("\n\n"):
        lines = [line for line in text.split("\n") if not line.startswith(":")]
        if not lines:
            continue
        name, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}", text
        events.append(event)
    return events


class ResponseStream:
    """Follows the events of a response. `finish` returns the response when all of them were right."""

    def __init__(self) -> None:
        self.items: list[dict] = []  # as their own events tell them
        self.open: dict | None = None
        self.part: dict | None = None
        self.end: dict | None = None
        self.num_events = 0

    def take(self, event: dict) -> None:
        assert self.end is None, f"{event['type']} after the end"
        assert event["sequence_number"] == self.num_events, event
        number, kind = self.num_events, event["type"]
        self.num_events += 1
        if number < 2:
            assert kind == ("response.created", "response.in_progress")[number]
            assert event["response"]["status"] == "in_progress"
            assert event["response"]["output"] == []
        elif kind in ENDS:
            assert self.open is None, f"{kind} while an item is open"
            assert event["response"]["status"] == ENDS[kind]
            assert event["response"]["output"] == self.items
            self.end = event["response"]
        elif kind == "response.output_item.added":
            assert self.open is None, "two items are open"
            assert event["output_index"] == len(self.items)
            self.open = dict(event["item"])
            assert self.open["status"] == "in_progress"
            self.items.append(self.open)
        else:
            assert self.open is not None, f"{kind} without an item"
            assert event["output_index"] == len(self.items) - 1
            getattr(self, "_" + self.open["type"])(kind, event)

    def _message(self, kind: str, event: dict) -> None:
        if kind == "response.output_item.done":
            assert self.part is not None, "an item without a part"
            assert event["item"]["content"] == [self.part]
            self._close(event["item"])
            return
        assert (event["item_id"], event["content_index"]) == (self.open["id"], 0)
        name = FIELD[self.open["type"]]
        if kind == "response.content_part.added":
            assert self.part is None
            self.part = event["part"]
            assert (self.part["type"], self.part["text"]) == (name, "")
            self.open["is_told"] = False
        elif kind == f"response.{name}.delta":
            assert not self.open["is_told"]
            assert event["delta"] or event.get("logprobs")
            self.part["text"] += event["delta"]
            if "logprobs" in self.part:
                self.part["logprobs"] = self.part["logprobs"] + event["logprobs"]
        elif kind == f"response.{name}.done":
            assert event["text"] == self.part["text"]
            self.open["is_told"] = True
        else:
            assert kind == "response.content_part.done", kind
            assert self.open["is_told"]
            assert event["part"] == self.part

    _reasoning = _message

    def _function_call(self, kind: str, event: dict) -> None:
        if kind == "response.output_item.done":
            assert self.open.pop("is_told"), "a call without its arguments"
            assert event["item"]["arguments"] == self.open["arguments"]
            self._close(event["item"])
            return
        assert event["item_id"] == self.open["id"]
        if kind == "response.function_call_arguments.delta":
            assert event["delta"]
            self.open["arguments"] += event["delta"]
        else:
            assert kind == "response.function_call_arguments.done", kind
            assert (event["arguments"], event["name"]) == (self.open["arguments"], self.open["name"])
            self.open["is_told"] = True

    def _close(self, item: dict) -> None:
        assert item["status"] in ("completed", "incomplete")
        assert item["id"] == self.open["id"]
        self.items[-1], self.open, self.part = item, None, None

    def finish(self) -> dict:
        assert self.end is not None, "the stream has no end"
        return self.end


def read_response(body: str) -> tuple[dict, list[dict]]:
    """The response of a whole stream, and its events."""
    stream, events = ResponseStream(), read_named_events(body)
    for event in events:
        stream.take(event)
    return stream.finish(), events


def read_message(body: str) -> tuple[dict, list[dict]]:
    """The message of a whole stream of Anthropic's events, with its `error` if it ended in one, and the events."""
    message: dict | None = None
    is_open = is_stopped = has_ended = is_cut = False
    events = read_named_events(body)
    arguments = ""
    for event in events:
        kind = event["type"]
        assert not has_ended, f"{kind} after the end"
        if kind == "ping":
            continue
        if kind == "error":
            message = {**(message or {}), "error": event["error"]}
            has_ended = True
        elif message is None:
            assert kind == "message_start", kind
            message = event["message"]
            assert (message["content"], message["stop_reason"]) == ([], None)
        elif kind == "content_block_start":
            assert not is_open, "two blocks are open"
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, arguments = True, ""
        elif kind == "content_block_delta":
            assert is_open, "a delta without a block"
            assert event["index"] == len(message["content"]) - 1
            arguments += _add_delta(message["content"][-1], event["delta"])
        elif kind == "content_block_stop":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            if arguments:
                try:
                    message["content"][-1]["input"] = json.loads(arguments)
                except ValueError:
                    is_cut = True
            is_open = False
        elif kind == "message_delta":
            assert not is_open
            assert not is_stopped
            is_stopped = True
            message |= event["delta"]
            message["usage"] |= event["usage"]
        else:
            assert kind == "message_stop", kind
            assert is_stopped
            has_ended = True
    assert has_ended, "the stream has no end"
    assert message is not None
    assert not is_cut or message["stop_reason"] == "max_tokens", "arguments that are no JSON"
    return message, events


def _add_delta(block: dict, delta: dict) -> str:
    """Adds to a block; returns what is added to the arguments of a call."""
    pairs = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
    if delta["type"] == "signature_delta":
        assert block["type"] == "thinking"
        block["signature"] += delta["signature"]
        return ""
    if block["type"] == "tool_use":
        assert delta["type"] == "input_json_delta"
        return delta["partial_json"]
    kind, name = pairs[block["type"]]
    assert delta["type"] == kind
    assert delta[name]
    block[name] += delta[name]
    return ""
