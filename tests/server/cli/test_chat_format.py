"""`peregrine doctor` on how a model's chats are taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ModelConfig
from server.cli.chat_format import chat_format
from tests.support.chat_templates import TEMPLATES
from tests.support.server_process import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


def test_doctor_says_what_was_read_off_the_template(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATES["qwen"])
    rows = dict(chat_format(ModelConfig(path=str(model), chat_template=str(template))))
    assert rows == {
        "tool calls": "json behind <tool_call> (derived from the chat template)",
        "reasoning": "<think> ... </think> (from the chat template)",
    }
    assert "server's instructions" in dict(chat_format(ModelConfig(path=str(model))))["tool calls"]


def test_doctor_says_nothing_of_a_model_that_is_elsewhere_and_why_there_are_no_chats(tmp_path: Path) -> None:
    assert list(chat_format(ModelConfig(path="someone/model"))) == []
    ((name, text),) = chat_format(ModelConfig(path=str(tmp_path)))
    assert name == "chats"
    assert text.startswith("none: ")
