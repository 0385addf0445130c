"""`peregrine train-heads`: makes prompts or texts into token ids, and starts the process that trains on them."""

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
)
FLAGS = ("--text", "--self-generate", "--output", *(name for name, *_ in _NUMBERS))
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
        "--output", type=Path, default=Path("heads"), metavar="DIR", help="where the heads go; and what resuming needs"
    )
    for name, default, (low, high), text in _NUMBERS:
        command.add_argument(
            name, type=partial(_number, low, high), default=default, metavar="N", help=f"{text} (default: {default:,})"
        )


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
    from engine.config import SpeculationConfig
    from engine.loading.loader import read_tokenizer
    from engine.training.heads_job import HeadsJob
    from server.text.tokenizer import Tokenizer
    from server.training.training_prompts import own_prompts, read_texts

    config = loaded.config.engine_config()
    tokenizer = Tokenizer(read_tokenizer(config.model, report=lambda phase, detail: print(f"{phase}: {detail}")))
    if parsed.text is not None:
        sequences = read_texts(tokenizer, parsed.text)
    else:
        sequences = own_prompts(tokenizer, parsed.tokens // _TOKENS_OF_ANSWER + _NUM_SPARE_PROMPTS, seed=config.seed)
    scheduler = config.scheduler
    if scheduler.max_num_seqs == "auto":
        scheduler = scheduler.model_copy(update={"max_num_seqs": _NUM_AT_ONCE})
    job = HeadsJob(
        engine=config.model_copy(update={"speculation": SpeculationConfig(), "scheduler": scheduler}),
        output=parsed.output,
        kind="answers" if parsed.text is None else "texts",
        sequences=sequences,
        num_tokens=parsed.tokens,
        num_heads=parsed.heads,
        num_known_tokens=parsed.known_tokens,
        markov_rank=parsed.markov_rank,
        num_epochs=parsed.epochs,
        seed=config.seed,
    )
    return job.write()
