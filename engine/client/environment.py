"""The environment of the engine process: ours, without what the engine has no use for if it leaks."""

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
    """Keys, tokens and passwords are told by their names. The hub's are kept where the config names something on a hub.

    config: None where it is not known: nothing is loaded from a hub. A checkout that is not installed must be found by
    the child as it was found by us.
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
