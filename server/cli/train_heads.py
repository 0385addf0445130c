"""`peregrine train-heads`: makes prompts or texts into token ids, and starts the process that trains on them.

With `--draft`, what is trained is a small draft model instead of heads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from engine.ipc.messages import EXIT_CODES
from server.complain import complain
from server.settings import LoadedConfig

_NUMBERS = (  # flag, default, least and most, what it is
    ("--tokens", 200_000, (1000, 10**9), "tokens to learn from"),
    ("--epochs", 3, (1, 1000), "how often each of them is learned from"),
    ("--heads", 3, (1, 16), "heads to train: the most tokens that are guessed at once"),
    ("--known-tokens", 4096, (16, 1 << 20), "tokens that heads guess among: the most frequent of those to learn from"),
    ("--markov-rank", 64, (0, 1024), "rank of the correction by the token before; 0: none"),
    ("--layers", None, (1, 1000), "with --draft: layers of the model that the draft model keeps (default: a quarter)"),
)
_OF_HEADS = ("--heads", "--known-tokens", "--markov-rank")
FLAGS = ("--text", "--self-generate", "--draft", "--output", *(name for name, *_ in _NUMBERS))
_TOKENS_OF_ANSWER = 100  # at least, on average: how many prompts are made for the tokens that are wanted
_NUM_AT_ONCE = 64  # answers
_NUM_SPARE_PROMPTS = 256


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags that this command has beside those of settings."""
    source = command.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn from, read by the model")
    source.add_argument(
        "--self-generate", action="store_true", help="learn from the model's answers to built-in prompts (the default)"
    )
    command.add_argument(
        "--draft", action="store_true", help="make a draft model of some of the model's own layers, instead of heads"
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the heads go, and what resuming needs (default: heads; with --draft: draft)",
    )
    for name, default, (low, high), text in _NUMBERS:
        shown = text if default is None else f"{text} (default: {default:,})"
        command.add_argument(name, type=partial(_number, low, high), metavar="N", help=shown)


def _number(low: int, high: int, text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {low:,} to {high:,}")
    return number


def train_heads(loaded: LoadedConfig, parsed: argparse.Namespace) -> int:
    """The exit code of the process that trains."""
    from engine.client.environment import engine_environment

    config = loaded.config.engine_config()
    try:
        job = _write_job(loaded, parsed)
    except (OSError, ValueError) as error:
        kind = str(getattr(error, "kind", "config"))
        complain(f"{kind}: {error}")
        return EXIT_CODES[kind]
    command = [sys.executable, "-m", "engine.training", str(job)]
    with subprocess.Popen(command, env=engine_environment(os.environ, config)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # which the other process got as well, and ends with what it has
                continue


def _write_job(loaded: LoadedConfig, parsed: argparse.Namespace) -> Path:
    """Writes what is to be done into the output's folder. ValueError where another job began there."""
    from engine.config import LossySpeculationConfig, SpeculationConfig
    from engine.loading.loader import read_tokenizer
    from engine.training.training_job import DraftJob, HeadsJob, TrainingJob
    from server.text.tokenizer import Tokenizer
    from server.training.training_prompts import own_prompts, read_texts

    numbers = _numbers(parsed)
    config = loaded.config.engine_config()
    tokenizer = Tokenizer(read_tokenizer(config.model, report=lambda phase, detail: print(f"{phase}: {detail}")))
    if parsed.text is not None:
        sequences = read_texts(tokenizer, parsed.text)
    else:
        count = numbers["--tokens"] // _TOKENS_OF_ANSWER + _NUM_SPARE_PROMPTS
        sequences = own_prompts(tokenizer, count, seed=config.seed)
    scheduler = config.scheduler
    if scheduler.max_num_seqs == "auto":
        scheduler = scheduler.model_copy(update={"max_num_seqs": _NUM_AT_ONCE})
    plain = {"speculation": SpeculationConfig(), "lossy_speculation": LossySpeculationConfig()}
    common = TrainingJob(
        engine=config.model_copy(update=plain | {"scheduler": scheduler}),
        output=parsed.output or Path("draft" if parsed.draft else "heads"),
        kind="answers" if parsed.text is None else "texts",
        sequences=sequences,
        num_tokens=numbers["--tokens"],
        num_epochs=numbers["--epochs"],
        seed=config.seed,
    )
    job: TrainingJob
    if parsed.draft:
        job = DraftJob(**dict(common), num_layers=numbers.get("--layers"))
    else:
        job = HeadsJob(
            **dict(common),
            num_heads=numbers["--heads"],
            num_known_tokens=numbers["--known-tokens"],
            markov_rank=numbers["--markov-rank"],
        )
    return job.write()


def _numbers(parsed: argparse.Namespace) -> dict[str, int]:
    """Those that were given, and the defaults of others. ValueError for one that is of what is not trained."""
    given = {name: getattr(parsed, name.removeprefix("--").replace("-", "_")) for name, *_ in _NUMBERS}
    for name in _OF_HEADS if parsed.draft else ("--layers",):
        if given[name] is not None:
            fix = "is for heads; leave it out, or --draft" if parsed.draft else "is for draft models; add --draft"
            raise ValueError(f"{name} {fix}")
    defaults = {name: default for name, default, *_ in _NUMBERS if default is not None}
    return defaults | {name: number for name, number in given.items() if number is not None}
