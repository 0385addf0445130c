"""What the engine process inherits: all that machines and libraries are set up by, and no secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.client.environment import engine_environment
from engine.config import EngineConfig, ModelConfig
from tests import ROOT
from tests.support.scripted_client import running

SECRETS = [
    "PEREGRINE_API_KEY", "OPENAI_API_KEY", "openai_apikey", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GH_TOKEN",
    "AWS_SESSION_TOKEN", "DB_PASSWORD", "PGPASSWORD", "GOOGLE_APPLICATION_CREDENTIALS", "CLIENT_SECRET", "SMTP_PASS",
]  # fmt: skip
HUB_SECRETS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"]
SETTINGS = [
    "PATH", "HOME", "LANG", "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HTTPS_PROXY", "PIP_INDEX_URL", "XDG_CACHE_HOME", "PEREGRINE_CACHE",
    "TRITON_CACHE_DIR", "TURKEYS",
]  # fmt: skip
INHERITED = {name: f"value of {name}" for name in (*SECRETS, *HUB_SECRETS, *SETTINGS)}


def config_of(path: str, tokenizer: str | None = None) -> EngineConfig:
    return EngineConfig(model=ModelConfig(path=path, tokenizer=tokenizer))


def test_the_engine_inherits_settings_and_no_secrets(tmp_path: Path) -> None:
    for config in (None, EngineConfig(), config_of(str(tmp_path)), config_of(str(tmp_path), str(tmp_path))):
        environment = engine_environment(INHERITED, config)
        assert not {*SECRETS, *HUB_SECRETS} & set(environment)
        assert all(environment[name] == INHERITED[name] for name in SETTINGS)


def test_a_model_or_a_tokenizer_from_a_hub_gets_the_hub_s_token_alone(tmp_path: Path) -> None:
    for config in (config_of("owner/model"), config_of(str(tmp_path), "owner/tokenizer")):
        environment = engine_environment(INHERITED, config)
        assert set(HUB_SECRETS) <= set(environment)
        assert not set(SECRETS) & set(environment)


def test_our_sources_are_found_before_what_is_on_the_path() -> None:
    root = str(ROOT)
    assert engine_environment({}, None)["PYTHONPATH"] == root
    assert engine_environment({"PYTHONPATH": "/other"}, None)["PYTHONPATH"] == f"{root}:/other"


async def test_the_keys_of_the_api_are_not_in_the_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_API_KEY", "sk-very-secret")
    monkeypatch.setenv("HF_HOME", "/a-setting")
    async with running() as client:
        environment = read_environment(client.pid)
    assert "sk-very-secret" not in environment
    assert "HF_HOME=/a-setting" in environment


def read_environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()
