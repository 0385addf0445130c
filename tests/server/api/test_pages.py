"""The pages for people: all of it from this server, under a strict policy, open where the data is not."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx
import pytest

from server.api.pages import FILES, OWN_FILES
from tests.server.telemetry.test_explanation import step

KEYS = {"server": {"api_keys": ["key"]}}
PAGES = ["/", "/docs"]


class Tags(HTMLParser):
    """The tags of a page with their attributes, and whether scripts and styles have text of their own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)

    @property
    def files(self) -> set[str]:
        sources = [attributes.get("src") or attributes.get("href") for _, attributes in self.tags]
        return {source for source in sources if source and not source.startswith("data:")}


def policy(response: httpx.Response) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_html_whose_files_are_all_here(operate, path):
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        page = client.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        tags = Tags(page.text)
        assert tags.inline == []
        assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]
        assert not [attributes for _, attributes in tags.tags if "style" in attributes]
        assert any(name.endswith(".js") for name in tags.files)
        for name in tags.files:
            assert not re.match(r"[a-z]+:|//", name), f"{name} is not this server's"
            assert not name.startswith("/"), f"{name} is lost behind a proxy's prefix"
            assert client.get("/" + name).status_code == 200, name


@pytest.mark.parametrize("path", [*PAGES, "/static/page.js"])
def test_the_policy_allows_nothing_from_elsewhere(operate, path):
    with operate() as operation:
        response = httpx.get(operation.url + path)
        allowed = policy(response)
        assert allowed["default-src"] == allowed["frame-ancestors"] == allowed["base-uri"] == "'none'"
        assert allowed["script-src"] == allowed["connect-src"] == "'self'"
        for sources in allowed.values():
            assert set(sources.split()) <= {"'self'", "'none'", "data:", "'unsafe-inline'"}
        assert ("'unsafe-inline'" in allowed["style-src"]) == (path == "/docs")
        assert response.headers["x-content-type-options"] == "nosniff"


def test_our_own_files_name_no_other_place():
    own = [path for path in OWN_FILES.iterdir() if path.is_file()]
    assert len(own) >= 5
    for path in own:
        assert not re.findall(r"https?://|//[a-z]+\.", path.read_text()), path.name


def test_every_file_is_there_with_its_type(operate):
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        for name in FILES:
            response = client.get(f"/static/{name}")
            assert response.status_code == 200, name
            kind = "text/css" if name.endswith(".css") else "text/javascript"
            assert response.headers["content-type"].startswith(kind)
            assert len(response.content) > 200
        for name in ("nothing.js", "..%2fconfig.py", "index.html", "%00"):
            assert client.get(f"/static/{name}").status_code == 404, name


def test_with_keys_the_pages_are_open_and_their_data_is_not(operate):
    with operate(KEYS) as operation, httpx.Client(base_url=operation.url) as client:
        for path in (*PAGES, *(f"/static/{name}" for name in FILES)):
            assert client.get(path).status_code == 200, path
            assert client.post(path).status_code == 401, path
        for path in ("/openapi.json", "/v1/server/status"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer key"}).status_code == 200


def test_the_status_of_a_server_that_starts(operate):
    with operate(ready=False) as operation:
        operation.call(operation.engine.enter, "weights", "98 MB")
        told = httpx.get(operation.url + "/v1/server/status").json()
        assert (told["state"], told["detail"]) == ("starting", "weights 98 MB")
        assert told["model"]["names"] == ["tiny", "org/other-name"]
        assert told["model"]["architecture"] is None
        assert told["load"]["output_tokens_per_second"] == 0


def test_the_status_says_what_is_served_and_how_fast(operate):
    with operate() as operation:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
        for _ in range(3):
            assert httpx.post(operation.url + "/v1/completions", json=body).status_code == 200
        told = httpx.get(operation.url + "/v1/server/status").json()
        assert told["state"] == "ready"
        assert (told["model"]["architecture"], told["model"]["max_model_len"]) == ("Tiny", 256)
        assert told["model"]["has_chat_template"] is True
        assert told["latency"]["requests"] == 3
        assert told["latency"]["time_to_first_token_median"] > 0
        assert told["latency"]["seconds_per_token_median"] >= 0
        assert told["speculation"] == {"method": "none", "acceptance": None}


def test_rates_are_of_the_last_seconds(operate):
    with operate({"speculation": {"method": "ngram"}}) as operation:
        recorder, now = operation.state.recorder, operation.state.started_at + 100.0
        old = step(now - 50, 0.1, num_output_tokens=1000)
        recent = {
            "num_output_tokens": 5,
            "num_prompt_tokens": 20,
            "num_draft_tokens": 4,
            "accepted_by_position": [2, 1],
        }
        recorder._steps.extend([old, *(step(now - 4 + index, 0.1, **recent) for index in range(3))])
        pace = recorder.pace(5.0, now)
        assert (pace.steps, pace.output_tokens, pace.prompt_tokens) == (3 / 5, 15 / 5, 60 / 5)
        assert pace.num_accepted_drafts / pace.num_draft_tokens == 9 / 12
