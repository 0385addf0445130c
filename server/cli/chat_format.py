"""How a model's answers are taken apart, for `peregrine doctor`: read off its chat template, before it is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from server.parsing.template_probe import probe_template
from server.text.chat_renderer import ChatRenderer
from server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.config import ModelConfig

Row = tuple[str, str]


def chat_format(config: ModelConfig) -> Iterator[Row]:
    """Of a model whose files are on this machine; of another one, nothing."""
    from engine.config import DEFAULT_MODEL
    from engine.loading.default_model import SMOLLM2, cache_directory
    from engine.models.model_error import ModelError

    path = Path(config.path).expanduser()
    default = cache_directory() / "models" / SMOLLM2.name / Path(SMOLLM2.member).name
    if not path.exists() and not (config.path == DEFAULT_MODEL and default.is_file()):
        return
    try:
        tokenizer = _tokenizer(config)
    except ModelError as error:
        yield "chats", f"none: {str(error).splitlines()[0]}"
        return
    renderer = ChatRenderer()
    try:
        traits = asyncio.run(probe_template(tokenizer, renderer))
    finally:
        renderer.close()
    for name, value, reason in traits.describe():
        yield name.replace("_", " "), f"{value} ({reason})"


def _tokenizer(config: ModelConfig) -> Tokenizer:
    from engine.loading.checkpoint import open_checkpoint
    from engine.loading.source import find_source
    from engine.loading.tokenizer_assets import load_tokenizer_assets

    config = config.model_copy(update={"load_format": "dummy"})  # the files of the weights are not needed
    source = find_source(config, lambda phase, detail: None)
    return Tokenizer(load_tokenizer_assets(source, config, open_checkpoint(source, config).whole_config))
