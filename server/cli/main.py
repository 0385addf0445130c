"""The command `peregrine`. Flags come from the config's schema; errors end in one line that says what to do."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, get_args

from pydantic import JsonValue

from engine.client.client import EngineClient, launch_engine
from engine.ipc.messages import EXIT_CODES
from server.cli import quantize as quantize_command
from server.cli import run_batch, train_heads
from server.cli.completion import SHELLS, Completed, script
from server.complain import complain, until_the_reader_leaves
from server.settings import (
    ConfigError,
    Layer,
    LoadedConfig,
    Setting,
    all_settings,
    load_config,
    read_assignments,
    read_environment,
    read_file,
)
from server.version import VERSION

COMMANDS = {
    "serve": "serve a model over HTTP",
    "plan": "say what fits into this machine's memory, before anything is loaded",
    "doctor": "say what this machine has, and which kernel each part of a model will use",
    "run-batch": "answer a file of requests, with a model in this process or by a server that runs",
    "train-heads": "train Medusa heads for a model, which guess its next tokens; or, with --draft, a draft model",
    "quantize": "write a checkpoint of a model whose matrices have 4 or 8 bits, which vLLM reads too",
    "completion": "print a script with which a shell completes commands and flags",
}

OWN_FLAGS = {"train-heads": train_heads.FLAGS, "run-batch": run_batch.FLAGS}  # beside those of settings

CONFIG_VARIABLE = "PEREGRINE_CONFIG"

_MERGE = "merge the adapter into its base model with peft's merge_and_unload, and serve the result as MODEL"
_ONE_PROCESS = "a model runs on one device; start a server for each"
_NO_TLS = "TLS is the load balancer's; configs/balancers has two, and docs/deployment.md the lines to add"
NOT_SUPPORTED = {  # vLLM's flags that have no counterpart, and what to do instead
    "--enable-lora": f"there are no LoRA adapters; {_MERGE}",
    "--lora-modules": f"there are no LoRA adapters; {_MERGE}",
    "--max-loras": f"there are no LoRA adapters; {_MERGE}",
    "--max-lora-rank": f"there are no LoRA adapters; {_MERGE}",
    "--tensor-parallel-size": _ONE_PROCESS,
    "--pipeline-parallel-size": _ONE_PROCESS,
    "--data-parallel-size": _ONE_PROCESS,
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs"), _NO_TLS),
    "--trust-remote-code": "code of a checkpoint is never run; families that transformers or Peregrine know need none",
    "--limit-mm-per-prompt": "images are not read; of multimodal checkpoints the language model answers text",
}


ONE_DEVICE = {  # keys of vLLM's JSON flags that are true of us with one value, and what to do with another
    "draft_tensor_parallel_size": "a draft model runs on one device, beside its model; leave it out or set it to 1",
}


class Parser(argparse.ArgumentParser):
    """Unknown flags name the nearest known one; every complaint is the last line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        complain(message)
        raise SystemExit(EXIT_CODES["config"])

    def parse_fully(self, arguments: Sequence[str]) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag in NOT_SUPPORTED:
                self.error(f"{flag} is not supported: {NOT_SUPPORTED[flag]}")
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._flags(parsed.command), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; peregrine {parsed.command} --help lists the flags"
            self.error(f"there is no flag {unknown[0]}{hint}")
        return parsed

    def _flags(self, command: str) -> list[str]:
        flags = [name for setting in flagged_settings() for name in option_names(setting)]
        if command == "completion":
            return ["--help"]
        if command == "quantize":
            return [*quantize_command.FLAGS, "--config", "--set", "--help"]
        own = OWN_FLAGS.get(command, ())
        return [*flags, *own, "--config", "--set", "--help"] if command in COMMANDS else ["--version", "--help"]


def main(arguments: Sequence[str] | None = None) -> int:
    return until_the_reader_leaves(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    parsed = parser.parse_fully(sys.argv[1:] if arguments is None else arguments)
    if parsed.command == "completion":
        print(script(parsed.shell, completed_commands()), end="")
        return 0
    try:
        loaded = load_config(layers(parsed))
    except ConfigError as error:
        complain(f"config: {error}")
        return EXIT_CODES["config"]
    if parsed.command == "plan":
        from server.cli.plan import plan

        return plan(loaded)
    if parsed.command == "doctor":
        from server.cli.doctor import doctor

        return doctor(loaded)
    if parsed.command == "train-heads":
        return train_heads.train_heads(loaded, parsed)
    if parsed.command == "run-batch":
        return run_batch.run_batch(loaded, parsed)
    if parsed.command == "quantize":
        return quantize_command.quantize(loaded, parsed)
    return _serve(loaded)


def _serve(loaded: LoadedConfig) -> int:
    launched = launch_engine(loaded.config)  # its imports take seconds, and the server's run meanwhile
    try:
        from server.cli.serve import serve

        return serve(loaded, make_engine=partial(EngineClient, first_child=launched))
    finally:
        launched.discard()


def make_parser() -> Parser:
    parser = Parser(prog="peregrine", description="Serves language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"peregrine {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="All settings are in configs/default.yaml and docs/operator-settings.md; "
            "those without a flag are set by --set or --config.",
            allow_abbrev=False,
        )
        if name == "completion":
            command.add_argument("shell", choices=SHELLS, help="source what it prints, or put it where the shell looks")
            continue
        if name == "run-batch":
            run_batch.add_files(command)
        number = None if name == "quantize" else "?"
        command.add_argument("model", nargs=number, metavar="MODEL", help=all_settings()["model.path"].description)
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, as YAML")
        if name == "quantize":  # of the settings, --set has the few that count: the model's tokenizer, the seed
            quantize_command.add_arguments(command)
            continue
        for setting in flagged_settings():
            add_flag(command, setting)
        if name == "train-heads":
            train_heads.add_arguments(command)
        if name == "run-batch":
            run_batch.add_arguments(command)
    return parser


def completed_commands() -> dict[str, Completed]:
    """The commands with their flags, for `script`."""
    flags: dict[str, tuple[str, ...]] = {"--config": (), "--set": (), "--help": ()}
    for setting in flagged_settings():
        words = [str(word) for word in get_args(setting.info.annotation) if isinstance(word, str)]
        flags |= dict.fromkeys(option_names(setting), tuple(words))
    all_flags: dict[str, dict[str, tuple[str, ...]]] = {
        "completion": {"--help": ()},
        **{name: {**flags, **dict.fromkeys(own, ())} for name, own in OWN_FLAGS.items()},
        "quantize": {**quantize_command.FLAGS, "--config": (), "--set": (), "--help": ()},
    }
    return {name: Completed(text, all_flags.get(name, flags)) for name, text in COMMANDS.items()}


def flagged_settings() -> Iterator[Setting]:
    """The settings that have a flag; of several that share one, the first."""
    seen: set[str] = set()
    for setting in all_settings().values():
        if setting.flag is not None and setting.flag.name not in seen:
            seen.add(setting.flag.name)
            yield setting


def option_names(setting: Setting) -> list[str]:
    assert setting.flag is not None
    name = setting.flag.name
    return [name, name.replace("--", "--no-", 1)] if setting.info.annotation is bool else [name]


def add_flag(command: argparse.ArgumentParser, setting: Setting) -> None:
    """Adds the flag of a setting. A flag that is not given sets nothing, so that files and defaults apply."""
    flag = setting.flag
    assert flag is not None
    text = f"{setting.description} [{setting.name}]".replace("%", "%%")
    suppressed = argparse.SUPPRESS
    if flag.key is not None:
        keys = {s.flag.key: s.name for s in all_settings().values() if s.flag is not None and s.flag.name == flag.name}
        text = "JSON object with " + ", ".join(f"{key} [{name}]" for key, name in keys.items())
        command.add_argument(flag.name, dest=flag.name, default=suppressed, metavar="JSON", help=text)
    elif setting.info.annotation is bool:
        command.add_argument(
            flag.name, dest=flag.name, default=suppressed, action=argparse.BooleanOptionalAction, help=text
        )
    elif isinstance(setting.default, list):
        command.add_argument(
            flag.name, dest=flag.name, default=suppressed, nargs="+", action="extend", metavar="VALUE", help=text
        )
    else:
        command.add_argument(flag.name, dest=flag.name, default=suppressed, metavar="VALUE", help=text)


def layers(parsed: argparse.Namespace) -> Iterator[Layer]:
    """The layers of the config, from the weakest to the strongest. Raises ConfigError."""
    values: dict[str, JsonValue] = vars(parsed)
    if base := os.environ.get(CONFIG_VARIABLE):  # an image's own settings, below those of who runs it
        yield read_file(Path(base))
    if parsed.config is not None:
        yield read_file(parsed.config)
    yield from read_environment(os.environ)
    if parsed.model is not None:
        yield Layer("MODEL", {"model.path": parsed.model})
    for setting in flagged_settings():
        flag = setting.flag
        assert flag is not None
        if flag.name in values and flag.key is None:
            yield Layer(flag.name, {setting.name: values[flag.name]})
        elif flag.name in values:
            yield read_json_flag(flag.name, str(values[flag.name]))
    yield read_assignments(parsed.set)


def read_json_flag(name: str, text: str) -> Layer:
    """The layer of a flag whose value is a JSON object of several settings. Raises ConfigError."""
    settings = {s.flag.key: s.name for s in all_settings().values() if s.flag is not None and s.flag.name == name}
    known = [key for key in settings if key is not None]
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{name}: must be a JSON object with keys of {', '.join(known)}")
    for key in ONE_DEVICE.keys() & given.keys():
        value = given.pop(key)
        if value is not None and (type(value) is not int or value != 1):
            raise ConfigError(f"{name}: {key} must be 1: {ONE_DEVICE[key]}")
    for key in given:
        if key not in settings:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{name}: there is no key {key!r}; {hint}")
    return Layer(name, {settings[key]: value for key, value in given.items()})
