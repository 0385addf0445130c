"""What the container files promise. There is no Docker where the tests run, so they are read."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml

from engine.config import DEFAULT_MODEL
from server.settings import load_config, read_file
from tests import ROOT

MONITORING = ROOT / "configs" / "monitoring"
IMAGE_TAG = re.compile(r"[\w-]+(/[\w-]+)?:v?\d+(\.\d+){1,2}[\w.-]*")  # no dot before the slash, so no host


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in joined.splitlines() if line.strip()]


def arguments(keyword: str) -> list[str]:
    return [rest for word, rest in instructions() if word == keyword]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, object]]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_the_image_is_a_pinned_cuda_runtime_unless_another_is_named() -> None:
    words = [word for word, _ in instructions()]
    assert words[:2] == ["ARG", "FROM"]
    name, _, base = arguments("ARG")[0].partition("=")
    assert arguments("FROM") == ["${" + name + "}"]
    assert IMAGE_TAG.fullmatch(base)
    assert base.startswith("nvidia/cuda:")
    assert "-runtime-" in base


def test_the_server_does_not_run_as_root() -> None:
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    created = next(run for run in arguments("RUN") if "useradd" in run)
    assert f" {user}" in created
    last = [word for word, _ in instructions()]
    assert last.index("USER") < last.index("ENTRYPOINT")
    assert not [word for word in last[last.index("USER") :] if word in ("RUN", "COPY", "ADD")]


def test_versions_are_those_that_were_tested() -> None:
    installs = [run for run in arguments("RUN") if "pip install" in run]
    assert "--constraint constraints.txt" in installs[0]
    assert all("--constraint" in run or "--no-deps" in run for run in installs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    defaults = dict(argument.partition("=")[::2] for argument in arguments("ARG"))
    assert defaults["EXTRAS"] in extras


@pytest.mark.parametrize(("extras", "requirement"), [("gpu", ".[gpu]"), ("", ".")])
def test_the_image_installs_something_that_is_a_requirement_with_extras_and_without(
    extras: str, requirement: str
) -> None:
    """The build's own shell command runs here, with a pip that only says what it was asked for."""
    install = next(run for run in arguments("RUN") if "pip install" in run)
    script = f'python3() {{ :; }}; pip() {{ echo "$@"; }}; {install}'
    settings = dict(argument.partition("=")[::2] for argument in arguments("ARG")) | {"EXTRAS": extras}
    ran = subprocess.run(["sh", "-c", script], env=settings, capture_output=True, text=True, check=True)
    *before, last = ran.stdout.splitlines()
    assert last.split()[-1] == requirement
    assert ["--index-url" in line for line in before] == ([] if extras else [True]), (
        "torch's CPU build, where no GPU is"
    )


def test_a_container_is_replaced_when_it_is_dead_and_not_while_it_restarts_its_engine() -> None:
    (check,) = arguments("HEALTHCHECK")
    assert "/livez" in check
    assert "8000" in arguments("EXPOSE")
    assert arguments("VOLUME") == ["/cache"]
    settings = " ".join(arguments("ENV"))
    assert all(f"{name}=/cache/" in settings for name in ("PEREGRINE_CACHE", "HF_HOME", "TRITON_CACHE_DIR"))


def test_the_server_is_the_first_process_so_that_signals_reach_it() -> None:
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["peregrine"]
    assert json.loads(arguments("CMD")[0])[:1] == ["serve"]


def test_all_that_is_copied_exists_and_is_sent_to_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {source for copy in arguments("COPY") for source in copy.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_composed_server_has_a_gpu_and_is_waited_for(services: dict) -> None:
    server = services["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "/readyz" in " ".join(server["healthcheck"]["test"])
    assert "cache:/cache" in server["volumes"]
    assert DEFAULT_MODEL in " ".join(server["command"])
    config = server["command"][server["command"].index("--config") + 1]
    loaded = load_config([read_file(ROOT / config)])
    assert int(server["stop_grace_period"].removesuffix("s")) > loaded.config.server.shutdown_timeout
    assert loaded.config.server.host == "0.0.0.0"


def test_others_are_optional_and_pinned(services: dict) -> None:
    others = {name: service for name, service in services.items() if name != "server"}
    assert all(service["profiles"] == ["monitoring"] for service in others.values())
    for service in services.values():
        assert IMAGE_TAG.fullmatch(service["image"])
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (ROOT / source).is_file()


def test_prometheus_scrapes_the_server_of_the_composition(services: dict) -> None:
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert services["server"]["ports"][0].endswith(f":{port}")
    assert host in services
    (source,) = yaml.safe_load((MONITORING / "datasource.yml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").partition(":")[0] in services
