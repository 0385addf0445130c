"""The place that an error names is in the body that was sent, not in the alternatives that were tried."""

import json

import pytest

from server.config import LimitsConfig
from server.errors import ApiError
from server.protocol.body import parse_body
from server.protocol.chat_fields import ChatBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "zz"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"stop": [["x"]]}, "stop[0]"),
    ],
)
async def test_no_alternative_is_part_of_the_place(fields, param):
    with pytest.raises(ApiError) as raised:
        await parse_body(json.dumps(CHAT | fields).encode(), ChatBody, LimitsConfig())
    assert raised.value.param == param
