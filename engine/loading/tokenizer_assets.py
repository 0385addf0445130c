"""What the server needs to turn text into ids and back, from wherever the model's files have it; and into files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from engine.config import ModelConfig
from engine.ipc.messages import TokenizerAssets
from engine.loading.gguf.vocabulary import gguf_tokenizer
from engine.loading.json_file import read_json_object
from engine.loading.source import ModelSource
from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from engine.models.model_error import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer_assets(source: ModelSource, config: ModelConfig, hf_config: CheckpointConfig) -> TokenizerAssets:
    """The tokenizer of the model, or the one that `config.tokenizer` names; with `config.chat_template` if set.

    hf_config: of the model. ModelError where there is none, or none that works without Python code of its own.
    """
    if config.tokenizer is not None:
        assets = hugging_face_tokenizer(config.tokenizer)
    elif source.kind == "gguf":
        assets = gguf_tokenizer(source.gguf_header)
    else:
        assets = hugging_face_tokenizer(str(source.path), hf_config)
    if config.chat_template is None:
        return assets
    return TokenizerAssets(
        tokenizer_json=assets.tokenizer_json,
        chat_template=_read_template(Path(config.chat_template).expanduser()),
        special_tokens=assets.special_tokens,
        add_bos_token=assets.add_bos_token,
    )


def check_token_ids(assets: TokenizerAssets, vocab_size: int, name: str) -> None:
    """ModelError where an ordinary text could become an id that the model's embedding has no row for.

    Special tokens are in no ordinary text: one that the chat template does not write may lie beyond, as that for images
    does in a language model which was split off a multimodal one. A request that names it is refused.
    """
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    added = tokenizer.get_added_tokens_decoder()
    named, template = set(assets.special_tokens.values()), assets.chat_template or ""
    beyond = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
        if token_id >= vocab_size
        and not (token_id in added and added[token_id].special and token not in named and token not in template)
    )
    if beyond:
        shown = ", ".join(f"{token!r} is {token_id}" for token_id, token in beyond[:3])
        raise ModelError(
            f"the tokenizer of {name} makes {len(beyond)} ids for which the model's embedding of {vocab_size} rows has "
            f"none ({shown}); name the model's own in model.tokenizer, or resize the embedding"
        )


def hugging_face_tokenizer(name: str, hf_config: CheckpointConfig | None = None) -> TokenizerAssets:
    """The tokenizer of a directory or hub id. ModelError where transformers cannot make a fast one.

    hf_config: of the model there. Without it transformers reads it again, and may import for seconds to do so.
    """
    from transformers import AutoTokenizer  # a second: it knows the names of every family

    if isinstance(hf_config, BareConfig):
        hf_config = hf_config.for_transformers()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, config=hf_config, trust_remote_code=False
        )
    except Exception as error:  # border: the tokenizers library raises no narrower class
        raise ModelError(
            f"{name} has no tokenizer that can be loaded: {_first_line(error)}; name another in model.tokenizer"
        ) from error
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{name} has a tokenizer written in Python ({type(tokenizer).__name__}), and only those of the tokenizers "
            "library are supported; name a directory with a tokenizer.json in model.tokenizer"
        )
    backend.no_truncation()  # limits are the server's business
    backend.no_padding()
    return TokenizerAssets(
        tokenizer_json=backend.to_str(),
        chat_template=_default_template(tokenizer.chat_template) or _processor_template(Path(name)),
        special_tokens=_special_tokens(tokenizer),
    )


def save_tokenizer(assets: TokenizerAssets, folder: Path) -> None:
    """Writes the files that transformers' fast tokenizers are read from."""
    (folder / "tokenizer.json").write_text(assets.tokenizer_json, encoding="utf-8")
    described: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **assets.special_tokens}
    if assets.chat_template is not None:
        described["chat_template"] = assets.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    found = {name: getattr(tokenizer, name, None) for name in _NAMED_TOKENS}
    return {name: str(token) for name, token in found.items() if token is not None}


def _default_template(template: str | dict[str, str] | None) -> str | None:
    """A tokenizer may carry several templates by name; requests cannot choose, so the one called default is it."""
    return template.get("default") if isinstance(template, dict) else template


def _processor_template(directory: Path) -> str | None:
    """That of a multimodal model's processor, which is beside the tokenizer in older checkpoints."""
    path = directory / "chat_template.json"
    template = read_json_object(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read model.chat_template {path}: {_first_line(error)}; give a Jinja file") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
