"""The environment variables of the engine process: the server's, without its secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from engine.config import DEFAULT_MODEL, EngineConfig

SECRET = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|PRIVATE|SECRET)?KEYS?|\w*TOKENS?|\w*SECRETS?|\w*PASSWORDS?|PASS|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)",
    re.IGNORECASE,
)
HUB = re.compile(r"(?:HF|HUGGING_?FACE)_\w*", re.IGNORECASE)  # HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH


def engine_environment(inherited: Mapping[str, str], config: EngineConfig | None) -> dict[str, str]:
    """`inherited` without keys, tokens and passwords, which are recognised by their names.

    The hub's are kept where the config names something on a hub; config None: it does not. PYTHONPATH leads the child
    to this checkout, where it is not installed.
    """
    needs_hub = config is not None and is_on_hub(config)
    environment = {
        name: value
        for name, value in inherited.items()
        if not SECRET.search(name) or (needs_hub and HUB.fullmatch(name))
    }
    root = str(Path(__file__).parents[2])
    if Path(root).name in ("site-packages", "dist-packages"):
        return environment
    path = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": root if not path else os.pathsep.join([root, path])}


def is_on_hub(config: EngineConfig) -> bool:
    """Whether the model, or its tokenizer, is no file or directory of this machine."""
    names = [name for name in (config.model.path, config.model.tokenizer) if name is not None]
    return any(name != DEFAULT_MODEL and not Path(name).expanduser().exists() for name in names)
