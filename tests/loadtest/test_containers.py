"""The trial of the image, as far as it needs no image: its judgement, and what it takes from this machine."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.containers.__main__ import main
from loadtest.containers.building import command, mounts, official_base, pip_settings
from loadtest.containers.trial import MAX_BYTES, Inside, Trial
from tests import ROOT

GOOD = Trial(
    first_start=9.0, second_start=4.0, two_starts=12.0, early_stop=0.2, early_exit_code=143, stop=1.0, exit_code=0,
    inside=Inside(
        user="10001", capabilities="0000000000000000", writable=[], tools=[], is_healthy=True, answer=" Paris"
    ),
)  # fmt: skip


def test_an_image_that_is_as_it_should_be_has_no_fault() -> None:
    assert GOOD.faults(MAX_BYTES) == []


@pytest.mark.parametrize(
    ("fault", "trial"),
    [
        ("user 0", replace(GOOD, inside=replace(GOOD.inside, user="0"))),
        ("capabilities", replace(GOOD, inside=replace(GOOD.inside, capabilities="00000000a80425fb"))),
        ("write /etc", replace(GOOD, inside=replace(GOOD.inside, writable=["/etc"]))),
        ("has gcc", replace(GOOD, inside=replace(GOOD.inside, tools=["gcc"]))),
        ("health", replace(GOOD, inside=replace(GOOD.inside, is_healthy=False))),
        ("answered nothing", replace(GOOD, inside=replace(GOOD.inside, answer=""))),
        ("told to end early", replace(GOOD, early_exit_code=137)),
        ("ended with code 137", replace(GOOD, exit_code=137)),
    ],
)
def test_each_fault_is_named(fault: str, trial: Trial) -> None:
    [found] = trial.faults(MAX_BYTES)
    assert fault in found


def test_a_large_image_is_a_fault() -> None:
    assert "1500000001 bytes" in GOOD.faults(MAX_BYTES + 1)[0]


def test_without_the_tools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main([]) == 2
    assert "apt install buildah podman" in capsys.readouterr().err


def test_a_command_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"sh -c .* ended with code 3:\n.*no space"):
        command(["sh", "-c", "echo no space left; exit 3"])


def test_the_base_is_the_dockerfile_s() -> None:
    assert f"ARG CPU_BASE={official_base()}\n" in (ROOT / "Dockerfile").read_text()


def test_pip_finds_in_the_build_what_it_finds_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nextra-index-url = file://{tmp_path}/a/simple\n  file://{tmp_path}/b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    settings = pip_settings()
    assert settings["PIP_EXTRA_INDEX_URL"].split()[-2:] == [f"file://{tmp_path}/a/simple", f"file://{tmp_path}/b"]
    top = "/".join(str(tmp_path).split("/")[:3])
    (tmp_path / "a" / "simple").mkdir(parents=True)
    assert f"--volume={top}:{top}:ro" in mounts(settings)
    assert mounts({}) == []
