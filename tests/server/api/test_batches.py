"""Files and batches over real HTTP, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from msgspec.structs import replace

from server.offline.batch_folder import BatchFolder, BatchFolderError
from tests.support.operated_server import Operation
from tests.support.server_world import wait_until

ENDPOINT = "/v1/chat/completions"
FINISHED = {"completed", "failed", "expired", "cancelled"}


def line(number: int, *, url: str = ENDPOINT, **fields: object) -> dict[str, object]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"line {number}"}], "max_tokens": 4, "seed": 1}
    if url == "/v1/completions":
        body = {"model": "tiny", "prompt": f"line {number}", "max_tokens": 4, "seed": 1}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": {**body, **fields}}


def as_file(*lines: object) -> io.BytesIO:
    data = b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    file = io.BytesIO(data)
    file.name = "input.jsonl"
    return file


def connect(operation: Operation, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{operation.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def operation(operate, tmp_path) -> Iterator[Operation]:
    with operate({"batches": {"folder": str(tmp_path / "batches")}}) as operation:
        yield operation


@pytest.fixture
def sdk(operation) -> Iterator[openai.OpenAI]:
    with connect(operation) as client:
        yield client


def begin(sdk: openai.OpenAI, *lines: object, endpoint: str = ENDPOINT, **fields: object):
    file = sdk.files.create(file=as_file(*lines), purpose="batch")
    return sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def finish(sdk: openai.OpenAI, batch):
    wait_until(lambda: sdk.batches.retrieve(batch.id).status in FINISHED, 20)
    return sdk.batches.retrieve(batch.id)


def answers(sdk: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    if file_id is None:
        return {}
    lines = [json.loads(each) for each in sdk.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def test_a_batch_goes_from_upload_to_answers(sdk, operation):
    batch = begin(sdk, *(line(n) for n in range(20)), metadata={"job": "nightly"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", ENDPOINT, "24h")
    assert batch.expires_at == batch.created_at + 86400
    assert batch.output_file_id is None
    done = finish(sdk, batch)
    assert done.status == "completed", done
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 20, 0)
    assert done.metadata == {"job": "nightly"}
    assert done.error_file_id is None
    assert done.errors is None
    assert done.model == "tiny"
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    found = answers(sdk, done.output_file_id)
    assert set(found) == {f"line-{n}" for n in range(20)}
    direct = sdk.chat.completions.create(**line(7)["body"])
    body = found["line-7"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == direct.choices[0].message.content
    assert found["line-7"]["response"]["status_code"] == 200
    assert found["line-7"]["response"]["request_id"]
    assert found["line-7"]["error"] is None
    usage = [each["response"]["body"]["usage"] for each in found.values()]
    assert done.usage.output_tokens == sum(each["completion_tokens"] for each in usage) == 80
    assert done.usage.input_tokens == sum(each["prompt_tokens"] for each in usage)
    file = sdk.files.retrieve(done.output_file_id)
    assert (file.purpose, file.bytes) == ("batch_output", len(sdk.files.content(file.id).content))
    metrics = httpx.get(operation.url + "/metrics").text
    assert 'peregrine_batches{model_name="tiny",status="completed"} 1.0' in metrics
    assert 'peregrine_batch_lines_total{model_name="tiny",outcome="completed"} 20.0' in metrics


def test_lines_go_to_the_engine_behind_everybody_and_with_a_share_of_their_own(sdk, operation):
    finish(sdk, begin(sdk, line(1)))
    sdk.chat.completions.create(**line(2)["body"])
    of_batch, direct = operation.engine.requests
    assert (of_batch.priority, of_batch.is_background) == (100, True)
    assert (direct.priority, direct.is_background) == (0, False)
    assert of_batch.tenant != direct.tenant
    assert of_batch.tenant_weight == pytest.approx(0.05 * direct.tenant_weight)
    assert of_batch.cache_salt == direct.cache_salt, "they share cached prefixes"


def test_a_full_queue_refuses_others_and_lets_lines_wait(operate, tmp_path):
    config = {"batches": {"folder": str(tmp_path / "b")}, "limits": {"max_queued_requests": 1}}
    with operate(config) as operation, connect(operation) as sdk:
        operation.engine.num_waiting = 1
        with pytest.raises(openai.RateLimitError):
            sdk.chat.completions.create(**line(2)["body"])
        assert finish(sdk, begin(sdk, line(1))).request_counts.completed == 1
        operation.engine.num_background_waiting = 1  # it is a batch that waits: nobody else is refused for that
        assert sdk.chat.completions.create(**line(2)["body"]).choices


def test_lines_that_fail_are_in_a_file_of_their_own(sdk):
    lines = [line(1), line(2, temperature=9), line(3, model="gpt-9"), line(4)]
    done = finish(sdk, begin(sdk, *lines))
    assert done.status == "completed"
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 2)
    assert set(answers(sdk, done.output_file_id)) == {"line-1", "line-4"}
    errors = answers(sdk, done.error_file_id)
    assert errors["line-2"]["response"]["status_code"] == 400
    assert errors["line-2"]["response"]["body"]["error"]["param"] == "temperature"
    assert errors["line-3"]["response"]["body"]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("lines", "codes", "numbers"),
    [
        ([line(1), b"{", line(2)], ["invalid_json"], [2]),
        ([line(1), line(1)], ["duplicate_custom_id"], [2]),
        ([line(1, url="/v1/completions")], ["invalid_url"], [1]),
        ([b"", b" "], ["empty_file"], [None]),
        ([line(1, stream=True)], ["invalid_line"], [1]),
        ([b"x"] * 150, ["invalid_json"] * 100, [*range(1, 101)]),
    ],
)
def test_a_file_that_cannot_be_run_fails_and_says_where(sdk, operation, lines, codes, numbers):
    done = finish(sdk, begin(sdk, *lines))
    assert done.status == "failed"
    assert [error.code for error in done.errors.data] == codes
    assert [error.line for error in done.errors.data] == numbers
    assert operation.engine.requests == []
    assert done.output_file_id is None


def test_too_many_lines_fail(operate, tmp_path):
    with operate({"batches": {"folder": str(tmp_path / "b"), "max_lines": 3}}) as operation, connect(operation) as sdk:
        assert finish(sdk, begin(sdk, *(line(n) for n in range(3)))).status == "completed"
        done = finish(sdk, begin(sdk, *(line(n) for n in range(4))))
        assert (done.status, done.errors.data[0].code) == ("failed", "too_many_requests")


def test_completions_are_batched_too(sdk):
    done = finish(sdk, begin(sdk, line(1, url="/v1/completions"), endpoint="/v1/completions"))
    assert answers(sdk, done.output_file_id)["line-1"]["response"]["body"]["object"] == "text_completion"


def test_cancelling_keeps_what_there_is(sdk, operation):
    operation.engine._answers.delay = 0.05
    batch = begin(sdk, *(line(n, max_tokens=8) for n in range(100)))
    wait_until(lambda: sdk.batches.retrieve(batch.id).request_counts.completed >= 2)
    cancelled = sdk.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    done = finish(sdk, batch)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    counts = done.request_counts
    assert 2 <= counts.completed < 100
    assert counts.completed + counts.failed == 100
    assert len(answers(sdk, done.output_file_id)) == counts.completed
    errors = answers(sdk, done.error_file_id)
    assert {error["error"]["code"] for error in errors.values()} == {"batch_cancelled"}
    wait_until(lambda: not operation.engine._answers.running)
    with pytest.raises(openai.ConflictError):
        sdk.batches.cancel(batch.id)


def test_lists_have_pages_and_the_newest_first(sdk):
    batches = [begin(sdk, line(n)) for n in range(5)]
    for batch in batches:
        finish(sdk, batch)
    newest_first = [batch.id for batch in reversed(batches)]
    page = sdk.batches.list(limit=2)
    assert [batch.id for batch in page.data] == newest_first[:2]
    assert page.has_more
    assert [batch.id for batch in sdk.batches.list(limit=2)] == newest_first, "the client reads on by itself"
    assert not sdk.batches.list(limit=5).has_more
    files = [file.id for file in sdk.files.list(purpose="batch", limit=2)]
    assert files == [batch.input_file_id for batch in reversed(batches)]
    assert len(list(sdk.files.list(order="asc"))) == 10
    assert next(iter(sdk.files.list(order="asc"))).id == batches[0].input_file_id
    for query in ("limit=0", "limit=101", "limit=x", "after=batch_0", "limit=%C2%B2"):
        assert httpx.get(f"{sdk.base_url}batches?{query}").status_code == 400, query


def test_files_can_be_read_and_deleted(sdk, operation):
    source = as_file(line(1))
    file = sdk.files.create(file=source, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.filename, file.purpose, file.status) == ("input.jsonl", "batch", "processed")
    assert file.expires_at == file.created_at + 3600
    assert sdk.files.content(file.id).content == source.getvalue()
    assert sdk.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(file.id)
    operation.engine._answers.delay = 0.05
    batch = begin(sdk, *(line(n) for n in range(50)))
    with pytest.raises(openai.ConflictError):
        sdk.files.delete(batch.input_file_id)
    sdk.batches.cancel(batch.id)
    done = finish(sdk, batch)
    assert sdk.files.delete(done.input_file_id).deleted


def test_what_is_switched_off_says_how_to_switch_it_on(operate):
    with operate() as operation, connect(operation) as sdk:
        for call in (
            lambda: sdk.files.create(file=as_file(line(1)), purpose="batch"),
            lambda: sdk.batches.create(input_file_id="file-x", endpoint=ENDPOINT, completion_window="24h"),
            lambda: sdk.batches.list(),
            lambda: sdk.files.content("file-x"),
        ):
            with pytest.raises(openai.NotFoundError, match="--batch-folder") as error:
                call()
            assert error.value.code == "batches_off"


def test_keys_see_their_own(operate, tmp_path):
    config = {"server": {"api_keys": ["one", "two"]}, "batches": {"folder": str(tmp_path / "b")}}
    with operate(config) as operation, connect(operation, "one") as one, connect(operation, "two") as two:
        batch = finish(one, begin(one, line(1)))
        assert batch.status == "completed"
        assert two.batches.list().data == two.files.list().data == []
        for call in (
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.files.content(batch.output_file_id),
            lambda: two.files.delete(batch.output_file_id),
            lambda: two.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert len(one.files.list().data) == 2
        assert httpx.get(operation.url + "/v1/files").status_code == 401
    kept = b"".join(path.read_bytes() for path in (tmp_path / "b").rglob("*.json"))
    assert b"one" not in kept.replace(b"done", b"").replace(b'"none"', b"")
    with operate(config) as operation, connect(operation, "one") as one, connect(operation, "two") as two:
        assert one.batches.retrieve(batch.id).status == "completed", "a key is known again after a restart"
        assert set(answers(one, batch.output_file_id)) == {"line-1"}
        assert two.batches.list().data == []


@pytest.mark.parametrize(
    "file_id",
    [
        "..%2f..%2fsecret",
        "../secret",
        "file-" + "0" * 24,
        "%2e%2e%2flock",
        "file-%00",
        "x" * 3000,
        "file-..%2f..%2flock",
    ],
)
def test_no_id_leads_out_of_the_folder(operation, file_id):
    for path in (f"/v1/files/{file_id}/content", f"/v1/files/{file_id}", f"/v1/batches/{file_id}"):
        answer = operation.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 404 " in answer.partition(b"\r\n")[0], answer


def form(*parts: bytes, boundary: str = "b") -> dict[str, object]:
    content = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    content += b"--" + boundary.encode() + b"--\r\n"
    return {"content": content, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\n'


@pytest.mark.parametrize(
    ("request_parts", "words"),
    [
        ({"json": {}}, "must be a form"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "boundary"),
        ({"content": b"x", "headers": {"Content-Type": f"multipart/form-data; boundary={'b' * 999}"}}, "boundary"),
        (form(PURPOSE), "file is required"),
        (form(FILE), "purpose is required"),
        (form(FILE, PURPOSE.replace(b"batch", b"fine-tune")), "fine-tune"),
        (form(FILE, FILE, PURPOSE), "two files"),
        (form(FILE.replace(b"{}\n", b""), PURPOSE), "file is empty"),
        (form(*[PURPOSE] * 40, FILE), "more than 16 fields"),
        (form(PURPOSE.replace(b"batch", b"x" * 5000), FILE), "1024 bytes"),
        ({**form(FILE, PURPOSE), "content": form(FILE, PURPOSE)["content"][:-6]}, "ends in the middle"),
        ({**form(FILE, PURPOSE), "content": b"nonsense"}, "cannot be read"),
        (form(b"X: " + b"y" * 9000 + b"\r\n" + FILE, PURPOSE), "cannot be read"),
        (form(FILE, PURPOSE, PURPOSE.replace(b"purpose", b"expires_after[seconds]")), "anchor"),
    ],
)
def test_a_form_that_is_wrong_is_refused(operation, tmp_path, request_parts, words):
    response = httpx.post(operation.url + "/v1/files", **request_parts)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert list((tmp_path / "batches" / "incoming").iterdir()) == []
    assert httpx.get(operation.url + "/v1/files").json()["data"] == []


def test_names_of_files_are_only_names(operation):
    wild = FILE.replace(b"a.jsonl", b"../../etc/pass\x00wd\xff")
    name = httpx.post(operation.url + "/v1/files", **form(wild, PURPOSE)).json()["filename"]
    assert "/" not in name
    assert name.startswith("passwd")


def test_large_files_are_uploaded_in_pieces_and_too_large_ones_are_not(operate, tmp_path):
    config = {
        "batches": {"folder": str(tmp_path / "b"), "max_file_bytes": 3_000_000},
        "limits": {"max_body_bytes": 9999},
    }
    with operate(config) as operation, connect(operation) as sdk:
        data = io.BytesIO(b"x" * 3_000_000)
        assert sdk.files.create(file=data, purpose="batch").bytes == 3_000_000
        for size in (3_000_001, 4_000_000):
            with pytest.raises(openai.APIError) as refused:  # some clients cannot send all that was refused
                sdk.files.create(file=io.BytesIO(b"x" * size), purpose="batch")
            assert getattr(refused.value, "status_code", 413) == 413
            assert len(sdk.files.list().data) == 1
        assert list((tmp_path / "b" / "incoming").iterdir()) == []
        chunked = httpx.post(
            operation.url + "/v1/files",
            content=iter([form(FILE, PURPOSE)["content"][:20], form(FILE, PURPOSE)["content"][20:]]),
            headers=form()["headers"],
        )
        assert chunked.status_code == 200
        too_long = httpx.post(operation.url + "/v1/chat/completions", content=b"x" * 20_000)
        assert too_long.status_code == 413, "other routes keep their limit"


def test_compressed_uploads_are_unpacked_within_the_limit(operate, tmp_path):
    config = {"batches": {"folder": str(tmp_path / "b"), "max_file_bytes": 1_000_000}}
    with operate(config) as operation:
        for size, status in ((900_000, 200), (50_000_000, 413)):
            parts = form(FILE.replace(b"{}\n", b"x" * size), PURPOSE)
            headers = {**parts["headers"], "Content-Encoding": "gzip"}
            response = httpx.post(operation.url + "/v1/files", content=gzip.compress(parts["content"]), headers=headers)
            assert response.status_code == status, response.text


def test_numbers_and_sizes_of_files_are_bounded(operate, tmp_path):
    config = {"server": {"api_keys": ["one", "two"]}}
    config["batches"] = {
        "folder": str(tmp_path / "b"), "max_files": 2, "max_key_bytes": 5000, "max_total_bytes": 8000
    }  # fmt: skip
    with operate(config) as operation, connect(operation, "one") as one, connect(operation, "two") as two:
        one.files.create(file=io.BytesIO(b"x" * 4000), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="max_key_bytes"):
            one.files.create(file=io.BytesIO(b"x" * 2000), purpose="batch")
        with pytest.raises(openai.InternalServerError, match="max_total_bytes") as full:
            two.files.create(file=io.BytesIO(b"x" * 4500), purpose="batch")
        assert full.value.status_code == 507
        one.files.create(file=io.BytesIO(b"x" * 900), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="max_files"):
            one.files.create(file=io.BytesIO(b"x"), purpose="batch")


def test_what_batches_leave_is_bounded_too(operate, tmp_path):
    """A file that is run again and again makes a file of answers each time; one that fails, a record."""
    with operate({"batches": {"folder": str(tmp_path / "b"), "max_files": 3}}) as operation, connect(operation) as sdk:
        bad = sdk.files.create(file=as_file(b"{"), purpose="batch")
        ids = []
        for _ in range(5):
            batch = sdk.batches.create(input_file_id=bad.id, endpoint=ENDPOINT, completion_window="24h")
            assert finish(sdk, batch).status == "failed"
            ids.append(batch.id)
        assert [batch.id for batch in sdk.batches.list()] == ids[:1:-1]
        assert len(list((tmp_path / "b" / "batches").iterdir())) == 3
        finish(sdk, begin(sdk, line(1)))
        with pytest.raises(openai.BadRequestError, match="max_files"):
            sdk.batches.create(input_file_id=bad.id, endpoint=ENDPOINT, completion_window="24h")


def test_unfinished_batches_of_a_key_are_bounded(operate, tmp_path):
    with operate({"batches": {"folder": str(tmp_path / "b"), "max_unfinished": 2}}) as operation:
        operation.engine._answers.delay = 0.5
        with connect(operation) as sdk:
            batches = [begin(sdk, line(1, max_tokens=100)) for _ in range(2)]
            with pytest.raises(openai.RateLimitError, match="max_unfinished"):
                begin(sdk, line(1))
            for batch in batches:
                sdk.batches.cancel(batch.id)
                finish(sdk, batch)
            begin(sdk, line(1))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"endpoint": "/tokenize"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, None),
        ({"metadata": {"a": 1}}, None),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 10}}, "output_expires_after.seconds"),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
def test_a_batch_that_can_never_run_is_refused(sdk, fields, param):
    file = sdk.files.create(file=as_file(line(1)), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h", **fields}
    response = httpx.post(f"{sdk.base_url}batches", json=body)
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param
    assert sdk.batches.list().data == []


def test_answers_are_no_input(sdk):
    done = finish(sdk, begin(sdk, line(1)))
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        sdk.batches.create(input_file_id=done.output_file_id, endpoint=ENDPOINT, completion_window="24h")


def test_old_files_are_removed(operate, tmp_path):
    config = {"batches": {"folder": str(tmp_path / "b"), "keep_days": 0.00003}}  # two seconds
    with operate(config) as operation, connect(operation) as sdk:
        batch = begin(sdk, line(1))
        wait_until(lambda: all(each.is_finished for each in operation.state.batches.folder.batches.values()))
        wait_until(lambda: sdk.files.list().data == [])
        asyncio.run_coroutine_threadsafe(operation.state.batches.remove_old(), operation.engine.loop).result(10)
        assert list((tmp_path / "b" / "files").iterdir()) == []
        assert sdk.batches.retrieve(batch.id).status == "completed", "what was done is known for longer"


def test_a_batch_outlives_the_server(operate, tmp_path):
    folder = {"batches": {"folder": str(tmp_path / "b"), "concurrency": 4}}
    with operate(folder) as operation, connect(operation) as sdk:
        operation.engine._answers.delay = 0.02
        batch = begin(sdk, *(line(n) for n in range(60)))
        wait_until(lambda: sdk.batches.retrieve(batch.id).request_counts.completed >= 5)
    asked_before = len(operation.engine.requests)
    assert asked_before < 60
    path = next((tmp_path / "b" / "files").glob(f"{operation.state.batches.folder.batches[batch.id].output_id}*"))
    path.write_bytes(path.read_bytes()[:-10])  # as a kill would leave it
    with operate(folder) as operation, connect(operation) as sdk:
        done = finish(sdk, batch)
        assert done.status == "completed"
        assert set(answers(sdk, done.output_file_id)) == {f"line-{n}" for n in range(60)}
        assert len(operation.engine.requests) <= 60 - 4
        assert done.usage.output_tokens == 240


def test_a_folder_has_one_server(operate, tmp_path, operation):
    with pytest.raises(BatchFolderError, match="in use by another server"):
        BatchFolder(Path(tmp_path / "batches"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BatchFolderError, match="name a folder"):
        BatchFolder(tmp_path / "file")
    (tmp_path / "b" / "files").mkdir(parents=True)
    (tmp_path / "b" / "files" / "mine.txt").write_text("precious")
    (tmp_path / "b" / "files" / f"file-{'0' * 24}.jsonl").write_text("an answer of a batch that is gone")
    BatchFolder(tmp_path / "b").close()
    assert [path.name for path in (tmp_path / "b" / "files").iterdir()] == ["mine.txt"]


def test_batches_that_wait_too_long_expire(operate, tmp_path):
    folder = {"batches": {"folder": str(tmp_path / "b"), "concurrency": 2}}
    with operate(folder) as operation, connect(operation) as sdk:
        operation.engine._answers.delay = 0.05
        batch = begin(sdk, *(line(n) for n in range(60)))
        wait_until(lambda: sdk.batches.retrieve(batch.id).request_counts.completed >= 2)
    kept = operation.state.batches.folder
    kept.save(replace(kept.batches[batch.id], expires_at=batch.created_at))
    with operate(folder) as operation, connect(operation) as sdk:
        done = finish(sdk, batch)
        assert done.status == "expired"
        errors = answers(sdk, done.error_file_id)
        assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
        assert done.request_counts.completed + done.request_counts.failed == 60
        assert done.request_counts.completed >= 2
        assert set(errors) | set(answers(sdk, done.output_file_id)) == {f"line-{n}" for n in range(60)}
