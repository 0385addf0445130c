"""The count of a body's values, which decides whether it is parsed."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from server.protocol import json_size
from server.protocol.json_size import JsonSize, bound_json, measure_json

TEXTS = st.text(alphabet=st.one_of(st.sampled_from('\\",:[]{}'), st.characters(codec="utf-8")), max_size=20)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(TEXTS, inner, max_size=6)),
    max_leaves=40,
)


def count(value: object) -> JsonSize:
    """num_values as it is counted there: commas and opening brackets, so that an empty container is one, too."""
    if not isinstance(value, list | dict):
        return JsonSize(0, 0)
    items = list(value.values()) if isinstance(value, dict) else value
    inner = [count(item) for item in items]
    num_fields = (len(value) + 1 if isinstance(value, dict) else 1) + sum(one.num_fields for one in inner)
    return JsonSize(num_fields, max(len(items), 1) + sum(one.num_values for one in inner))


@given(value=VALUES, ascii_only=st.booleans(), piece=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_values_are_counted_as_a_parser_would_find_them(value: object, ascii_only: bool, piece: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    whole, json_size._PIECE = json_size._PIECE, piece
    try:
        assert measure_json(text) == count(value)
        bound = bound_json(text)
        assert bound.num_fields >= count(value).num_fields
        assert bound.num_values >= count(value).num_values
    finally:
        json_size._PIECE = whole


def test_backslashes_to_the_end_of_time_are_no_trouble() -> None:
    assert measure_json(b'{"a": "' + b"\\" * 3_000_000 + b'", "b": 1}') == JsonSize(3, 2)
    assert measure_json(b'"' + b"\\" * 3_000_001 + b'", "b": 1}') == JsonSize(0, 0)
