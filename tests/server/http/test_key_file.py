"""The key file: names of tenants, and keys that change while the server runs."""

import os
import re
from pathlib import Path

import httpx
import pytest

from server.generation.tenant_terms import TenantTerms
from server.http.auth import ApiKeys
from server.http.key_file import KeyFile, KeyFileError, read_key_file
from tests.support.server_world import wait_until

FILE = "# who may\nacme  key-one\nacme key-two\n\nother key-three\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(FILE)
    return tmp_path / "keys"


def test_a_line_is_a_name_and_a_key(path: Path) -> None:
    contents = read_key_file(path)
    assert contents.names == {"key-one": "acme", "key-two": "acme", "key-three": "other"}
    assert contents.terms == {}


def test_terms_of_a_tenant_stand_behind_one_of_its_keys_and_change_with_the_file(path: Path) -> None:
    path.write_text("acme key-one weight=2.5 tokens_per_minute=600\nacme key-two\nother key-three\n")
    keys = ApiKeys(["plain"], has_file=True)
    file = KeyFile(path, keys)
    terms = {key: keys.terms_of(keys.tenant_of(key) or "") for key in (b"key-one", b"key-two", b"key-three", b"plain")}
    assert terms == {b"key-one": (given := TenantTerms(2.5, 600)), b"key-two": given} | dict.fromkeys(
        (b"key-three", b"plain"), TenantTerms()
    )
    path.write_text("acme key-one weight=1\n")
    file.reload()
    assert keys.terms_of(keys.tenant_of(b"key-one") or "") == TenantTerms()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("acme\n", "line 1: has one word; write NAME KEY"),
        ("acme my secret\n", "line 1: behind the key stand terms as weight=2"),
        ("acme secret weight=-1\n", "line 1: behind the key stand terms"),
        ("acme secret weight=0\n", "line 1: weight is 0; it must be above 0 and at most 1000"),
        ("acme secret weight=1e5\n", "line 1: behind the key stand terms"),
        ("acme secret weight=1 weight=2\n", "line 1: behind the key stand terms"),
        ("acme secret tokens_per_minute=nan\n", "line 1: behind the key stand terms"),
        ("acme secret weight=1\nacme secret2 weight=2\n", "line 2: has other terms of acme than a line before"),
        ("ok secret\nac/me secret-two\n", "line 2: a name has up to 64 letters"),
        ("acme secret\nother secret\n", "line 2: has the key of 'acme'"),
        ("a b\n" * 2**18 + "a b", "more than 1048576 bytes"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_line_and_without_its_keys(
    path: Path, content: str | bytes, complaint: str
) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeyFileError, match=re.escape(complaint)) as raised:
        read_key_file(path)
    assert "secret" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_keys_of_one_name_are_one_tenant_and_stay_it(path: Path) -> None:
    keys = ApiKeys(["plain"], has_file=True)
    file = KeyFile(path, keys)
    acme = keys.tenant_of(b"key-one")
    assert acme == keys.tenant_of(b"key-two")
    assert len({acme, keys.tenant_of(b"key-three"), keys.tenant_of(b"plain"), None}) == 4
    assert (keys.name_of(acme or ""), keys.name_of(keys.tenant_of(b"plain") or "")) == ("acme", "")
    path.write_text("acme key-four\n")
    file.reload()
    assert keys.tenant_of(b"key-four") == acme
    assert keys.tenant_of(b"key-one") is keys.tenant_of(b"key-three") is None
    assert keys.tenant_of(b"plain") is not None


def test_a_file_that_breaks_later_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys([], has_file=True)
    file = KeyFile(path, keys)
    path.write_text("acme\n")
    file.reload()
    assert keys.tenant_of(b"key-one") is not None
    path.unlink()
    file.reload()
    assert keys.tenant_of(b"key-one") is not None
    assert caplog.text.count("the keys stay as they were") == 2


def test_a_file_without_keys_opens_nothing(path: Path) -> None:
    path.write_text("# nobody yet\n")
    keys = ApiKeys([], has_file=True)
    KeyFile(path, keys)
    assert not keys.is_empty


def status(operation, key: str) -> int:
    return httpx.get(operation.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code


def test_a_server_takes_the_keys_of_the_file_as_it_is_now_and_logs_their_names(operate, path, caplog) -> None:
    caplog.set_level("INFO", logger="peregrine.access")
    with operate({"access": {"key_file": str(path)}}) as operation:
        assert [status(operation, key) for key in ("key-one", "key-three", "key-five")] == [200, 200, 401]
        lines = [record.getMessage() for record in caplog.records if record.name == "peregrine.access"]
        wait_until(lambda: any("tenant=acme" in line for line in lines))
        assert not any("key-" in line for line in lines)
        replaced = path.with_suffix(".new")
        replaced.write_text("acme key-five\n")
        os.replace(replaced, path)  # as editors and clusters do
        wait_until(lambda: status(operation, "key-five") == 200)
        assert status(operation, "key-one") == 401


def test_a_server_with_an_unusable_file_is_not_made(operate, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyFileError, match="cannot be read: No such file"),
        operate({"access": {"key_file": str(tmp_path / "none")}}),
    ):
        pass
