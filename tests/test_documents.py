"""What README.md and the pages below docs/ name is there: files, sections, flags, settings, modules, routes."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route

from server.app import ROUTERS
from server.cli import quantize
from server.cli.main import COMMANDS, OWN_FLAGS, flagged_settings, option_names
from server.settings import all_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`|^    ([^ ].*)$", re.MULTILINE)
FLAGS = {"--config", "--set", "--help", "--version", *quantize.FLAGS}.union(
    *OWN_FLAGS.values(), *(option_names(setting) for setting in flagged_settings())
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def codes(page: Path) -> Iterator[str]:
    """What stands in backticks, or in a line of an indented block without its comment."""
    for inline, line in CODE.findall(page.read_text()):
        yield inline or line.partition("  #")[0].rstrip()


def anchors(page: Path) -> set[str]:
    """Of its headings, as the hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for code in codes(page):
        for name in re.findall(r"(?<![\w/])(?:server|engine|kernels|loadtest|configs|tests|docs)/[\w./-]*", code):
            assert (ROOT / name).exists(), f"{page.name}: {code}"


@pages
def test_flags_and_settings_that_are_named_exist(page: Path) -> None:
    settings = all_settings()
    sections = "|".join({name.partition(".")[0] for name in settings if "." in name})
    for code in codes(page):
        for name in re.findall(rf"(?:^|--set )((?:{sections})\.[a-z_]+)(?:=|$)", code):
            assert name in settings, f"{page.name}: {code}"
        if code.startswith(("--", "peregrine", ".venv/bin/peregrine", "make serve ARGS")):
            assert set(re.findall(r"--[a-z][a-z-]*", code)) <= FLAGS, f"{page.name}: {code}"


@pages
def test_commands_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in codes(page):
        for module in re.findall(r"python -m (\w+(?:\.\w+)*)", code):
            assert importlib.util.find_spec(module) is not None, f"{page.name}: {code}"
        for command in re.findall(r"(?:^|bin/)peregrine ([a-z-]+)", code):
            assert command in COMMANDS, f"{page.name}: {code}"
        for target in re.findall(r"^make ([a-z-]+)", code):
            assert target in targets, f"{page.name}: {code}"


def test_the_page_on_the_api_has_every_route() -> None:
    routes = {
        re.sub(r"{.*}", "{id}", route.path)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, Route) and route.include_in_schema
    }
    named = {
        path for code in codes(ROOT / "docs" / "api.md") for path in re.findall(r"^(?:[A-Z]+ )?(/[\w/{}-]*)$", code)
    }
    assert routes <= named
    assert named - routes <= {"/", "/docs", "/openapi.json", "/v1", "/v1/messages", "/api"}
