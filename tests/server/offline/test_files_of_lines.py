"""Files of requests and of answers: every line is accounted for, whatever is in it and wherever a kill has cut it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.offline.answer_file import AnswerFile, AnswerFileError
from server.offline.answer_lines import answer_of, error_of, read_answer
from server.offline.line_keys import KeyCollector, id_key, number_key
from server.offline.request_lines import BadLine, RequestLine, parse_line, read_lines

URLS = ("/v1/completions",)
GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}


def written(path: Path, *lines: object) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read(path: Path, max_line_bytes: int = 1000) -> list[RequestLine | BadLine]:
    return list(read_lines(path, max_line_bytes=max_line_bytes, urls=URLS))


def test_lines_are_read_in_order_with_their_numbers(tmp_path):
    path = written(tmp_path / "in", GOOD, b"", b"  ", {**GOOD, "custom_id": "b"})
    assert [(line.number, line.custom_id) for line in read(path)] == [(1, "a"), (4, "b")]
    assert json.loads(read(path)[0].body) == GOOD["body"]


def test_byte_order_marks_line_ends_and_a_missing_last_one_are_taken(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert [type(line) for line in read(path)] == [RequestLine, RequestLine]
    path.write_bytes(b"\xef\xbb\xbf")
    assert read(path) == []


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"{", "invalid_json", "line 1: it is not valid JSON"),
        (b'{"custom_id": "a\xff"}', "invalid_json", "UTF-8"),
        (b"[1]", "invalid_line", "must be a JSON object"),
        (b"null", "invalid_line", "must be a JSON object"),
        (b'{"a":' * 50_000, "invalid_json", "nested too deeply"),
        ({}, "missing_field", "custom_id is missing"),
        ({**GOOD, "custom_id": 1}, "invalid_line", "custom_id must be a text"),
        ({**GOOD, "custom_id": ""}, "invalid_line", "0 characters"),
        ({**GOOD, "custom_id": "x" * 513}, "invalid_line", "513 characters"),
        ({**GOOD, "method": "GET"}, "invalid_line", 'method must be "POST"'),
        ({**GOOD, "url": "/metrics"}, "invalid_url", "/v1/completions"),
        ({**GOOD, "url": "/v1/completions/../../metrics"}, "invalid_url", "cannot be asked"),
        ({**GOOD, "body": "x"}, "invalid_line", "body must be a JSON object"),
        ({key: GOOD[key] for key in GOOD if key != "body"}, "missing_field", "body is missing"),
        ({**GOOD, "body": {"stream": True}}, "invalid_line", "stream"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, code, words):
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    bad = parse_line(data, 1, urls=URLS)
    assert isinstance(bad, BadLine)
    assert bad.code == code
    assert words in bad.message
    assert len(bad.message) < 400


def test_a_body_s_own_mistakes_are_for_the_route(tmp_path):
    for body in (b'{"stream": tru}', b'{"a": \xff}', b'{"stream": "yes"}', b'{"temperature": 99}'):
        line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": %s}' % body
        assert parse_line(line, 1, urls=URLS).custom_id in ("a", None)


def test_lines_that_are_too_long_are_skipped_without_being_held(tmp_path):
    long = {**GOOD, "body": {"prompt": "x" * 300_000}}
    path = written(tmp_path / "in", long, GOOD, long)
    first, second, third = read(path)
    assert (first.code, third.code, third.number) == ("line_too_long", "line_too_long", 3)
    assert isinstance(second, RequestLine)
    just = written(tmp_path / "just", GOOD)
    size = len(just.read_bytes()) - 1
    assert isinstance(read(just, size)[0], RequestLine)
    assert isinstance(read(just, size - 1)[0], BadLine)


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_no_bytes_make_reading_fail(lines):
    data = b"\n".join(lines)
    for number, line in enumerate(data.split(b"\n"), start=1):
        assert parse_line(line, number, urls=URLS).number == number


@given(st.lists(st.integers(0, 30)), st.integers(0, 40))
def test_keys_are_found_and_repeated_ones_are_known(numbers, other):
    keys = KeyCollector()
    for number in numbers:
        keys.add(id_key(str(number)))
    sealed = keys.sealed()
    assert (id_key(str(other)) in sealed) == (other in numbers)
    assert number_key(other, "") not in sealed
    assert keys.sealed().repeated() == {id_key(str(n)) for n in numbers if numbers.count(n) > 1}


def test_keys_that_end_in_zeros_are_themselves():
    keys = KeyCollector()
    zeros = [b"\1" + b"\0" * 15, b"\1\2" + b"\0" * 14, b"\0" * 16]
    for key in (*zeros, zeros[0], zeros[2]):
        keys.add(key)
    assert all(key in keys.sealed() for key in zeros)
    assert keys.sealed().repeated() == {zeros[0], zeros[2]}
    assert b"\1" * 16 not in keys.sealed()


def request_line(number: int) -> RequestLine:
    return RequestLine(number, f"line {number} é", "/v1/completions", b"{}")


def test_answers_are_read_as_they_were_written():
    line = request_line(3)
    body = json.dumps({"id": "x", "usage": USAGE}, indent=2).encode()
    good = answer_of(line, status=200, request_id="r", body=body)
    assert good.data.count(b"\n") == 1
    back = read_answer(good.data)
    assert (back.key, back.is_ok, back.usage) == (line.key, True, good.usage)
    assert (good.usage.prompt_tokens, good.usage.cached_tokens, good.usage.output_tokens) == (5, 2, 7)
    told = json.loads(good.data)
    assert told["id"].startswith("batch_req_")
    assert told["custom_id"] == line.custom_id
    assert told["response"] == {"status_code": 200, "request_id": "r", "body": json.loads(body)}
    assert told["error"] is None


def test_failures_and_what_is_no_json_are_errors():
    line = request_line(3)
    refused = answer_of(line, status=400, request_id="r", body=b'{"error": {}}')
    assert not refused.is_ok
    assert json.loads(refused.data)["response"]["status_code"] == 400
    html = answer_of(line, status=200, request_id="r", body=b"<html>")
    assert not html.is_ok
    assert json.loads(html.data)["error"]["code"] == "invalid_answer"
    assert read_answer(html.data).key == line.key
    bad = BadLine(9, None, "invalid_json", "line 9: it is not")
    assert read_answer(error_of(bad, code=bad.code, message=bad.message).data).key == number_key(9, "")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.integers(1, 5), st.data())
def test_wherever_a_file_is_cut_whole_lines_stay_and_half_ones_go(tmp_path, count, data):
    lines = [
        answer_of(request_line(n), status=200, request_id="r", body=b'{"a": "\xc3\xa9"}').data for n in range(count)
    ]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path / "out"
    path.write_bytes(whole[:cut])
    with AnswerFile(path) as file:
        kept = [answer.key for answer in file.answers()]
        num_whole = sum(len(b"".join(lines[: n + 1])) - 1 <= cut for n in range(count))
        assert kept == [request_line(n).key for n in range(num_whole)]
        file.append(lines[0])
        assert file.size == path.stat().st_size
    assert path.read_bytes() == b"".join(lines[:num_whole]) + lines[0]


def test_a_tail_of_zeros_is_cut_off(tmp_path):
    path = tmp_path / "out"
    line = answer_of(request_line(1), status=200, request_id="r", body=b"{}").data
    path.write_bytes(line + b"\0" * 200_000)
    with AnswerFile(path) as file:
        assert len(list(file.answers())) == 1
    assert path.read_bytes() == line


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b'{"precious": 1}\n{"x"', b"\0\0", b"x" * 200_000])
def test_a_file_that_is_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(AnswerFileError, match="name another file"):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "out"
    line = answer_of(request_line(1), status=200, request_id="r", body=b"{}").data
    path.write_bytes(line + b"{}\n" + line)
    with AnswerFile(path) as file, pytest.raises(AnswerFileError, match="line 2"):
        list(file.answers())


def test_one_process_writes_at_a_time(tmp_path):
    with AnswerFile(tmp_path / "out"), pytest.raises(AnswerFileError, match="another process"):
        AnswerFile(tmp_path / "out")
    AnswerFile(tmp_path / "out").close()


def test_a_write_that_fails_leaves_no_half_line(tmp_path):
    import resource
    import signal

    with AnswerFile(tmp_path / "out") as file:
        line = answer_of(request_line(1), status=200, request_id="r", body=b"{}").data
        file.append(line)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 10, hard))  # a disk with room for ten more bytes
        try:
            with pytest.raises(OSError, match="File too large"):
                file.append(line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / "out").read_bytes() == line
        file.append(line)
    assert (tmp_path / "out").read_bytes() == line * 2
