"""Loading of the config from files, flags and the environment. Errors name the source of a value, and the fix."""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from pydantic import JsonValue, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from engine.config import Flag, Section
from server.complain import print_all
from server.config import Config

KEY_VARIABLES = {"PEREGRINE_API_KEY": "server.api_keys", "PEREGRINE_OPERATOR_KEY": "server.operator_keys"}


class ConfigError(ValueError):
    """A setting that cannot be used."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the schema: `name` is "section.key", or "key" outside the sections."""

    name: str
    info: FieldInfo
    for_operators: bool = False  # on a page of its own, not in configs/default.yaml

    @property
    def flag(self) -> Flag | None:
        return next((item for item in self.info.metadata if isinstance(item, Flag)), None)

    @property
    def default(self) -> JsonValue:
        value: JsonValue = self.info.default
        return value

    @property
    def description(self) -> str:
        return self.info.description or ""


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place. Later layers win."""

    source: str  # a file, a flag, an environment variable
    values: Mapping[str, JsonValue]  # by setting


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    config: Config
    sources: dict[str, str]  # where each value came from that is not a default


@cache
def all_settings() -> dict[str, Setting]:
    """The schema, flat, in its order."""
    settings: dict[str, Setting] = {}
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, field in section.model_fields.items():
                settings[f"{name}.{key}"] = Setting(f"{name}.{key}", field, section.for_operators)
        else:
            settings[name] = Setting(name, info)
    return settings


def value_of(config: Config, name: str) -> JsonValue:
    """The value of a setting as JSON."""
    value: JsonValue = config.model_dump(mode="json")
    for part in name.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def default_yaml() -> str:
    """The file configs/default.yaml, which a test compares with this: every setting that is not for operators only."""
    lines = [
        "# Every setting, with its default; docs/operator-settings.md has those that only operators turn.",
        "# Made by: python -m server.settings > configs/default.yaml",
    ]
    section = ""
    for name, setting in all_settings().items():
        if setting.for_operators:
            continue
        group, _, key = name.rpartition(".")
        indent = "  " if group else ""
        if group != section:
            lines += ["", f"{group}:"] if group else [""]
            section = group
        flag = setting.flag
        shown = f" [{flag.name}{f' key {flag.key}' if flag.key else ''}]" if flag is not None else ""
        value = _as_yaml(setting.default)
        lines += textwrap.wrap(
            f"{setting.description}{shown}", 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines) + "\n"


def operators_page() -> str:
    """The file docs/operator-settings.md, which a test compares with this: sections that only operators turn."""
    lines = [
        "# Settings for operators",
        "",
        "Limits and times that a deployment may have to change, beside those in `configs/default.yaml`. They are set "
        "in the same ways: in a YAML file (`--config`) or one by one (`--set limits.max_n=16`).",
        "",
        "Made by: `python -m server.settings operators > docs/operator-settings.md`",
    ]
    section = ""
    for name, setting in all_settings().items():
        if not setting.for_operators:
            continue
        group = name.partition(".")[0]
        if group != section:
            description = inspect.getdoc(Config.model_fields[group].annotation) or ""
            lines += ["", f"## {group}", "", description, "", "| setting | default | meaning |", "|---|---|---|"]
            section = group
        flag = f" (`{setting.flag.name}`)" if setting.flag is not None else ""
        lines.append(f"| `{name}`{flag} | `{_as_yaml(setting.default)}` | {setting.description} |")
    return "\n".join(lines) + "\n"


def _as_yaml(value: JsonValue) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=120).removesuffix("...\n").strip()


def read_file(path: Path) -> Layer:
    """The layer of a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}; --config takes a YAML file") from error
    return Layer(str(path), flatten(_parse_yaml(text, str(path)), source=str(path)))


def read_assignments(assignments: Iterable[str]) -> Layer:
    """The layer of `--set a.b=c` options, whose values are YAML. Raises ConfigError."""
    values: dict[str, JsonValue] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: there is no value; write --set {name}=VALUE")
        values[_known(name.strip(), source="--set")] = _parse_yaml(text, f"--set {name}")
    return Layer("--set", values)


def read_environment(environment: Mapping[str, str]) -> list[Layer]:
    """The layers of the environment: the keys, which a list of processes would show if they were flags."""
    layers = []
    for variable, setting in KEY_VARIABLES.items():
        keys: list[JsonValue] = [key for key in map(str.strip, environment.get(variable, "").split(",")) if key]
        if keys:
            layers.append(Layer(variable, {setting: keys}))
    return layers


def flatten(tree: JsonValue, *, source: str) -> dict[str, JsonValue]:
    """{"server": {"port": 1}} -> {"server.port": 1}. Raises ConfigError for keys that do not exist."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must have sections, such as `server:` with `port: 8000` indented below it")
    values: dict[str, JsonValue] = {}
    for key, value in tree.items():
        if key in all_settings():
            values[key] = value
        elif not any(name.startswith(f"{key}.") for name in all_settings()):
            _known(key, source=source)
        elif isinstance(value, dict):
            values |= {_known(f"{key}.{inner}", source=source): item for inner, item in value.items()}
        elif value is not None:  # a section whose lines are all comments is empty
            raise ConfigError(f"{source}: {key} is a section; indent its settings below it")
    return values


def load_config(layers: Iterable[Layer]) -> LoadedConfig:
    """The config of the layers, of which later ones win. Raises ConfigError with every value that is wrong."""
    values: dict[str, JsonValue] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.values.items():
            values[name] = value
            sources[name] = layer.source
    tree: dict[str, JsonValue] = {}
    for name, value in values.items():
        section, dot, key = name.rpartition(".")
        if not dot:
            tree[key] = value
            continue
        group = tree.setdefault(section, {})
        assert isinstance(group, dict)
        group[key] = value
    try:
        return LoadedConfig(Config.model_validate(tree), sources)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from error


def _parse_yaml(text: str, source: str) -> JsonValue:
    try:
        return TypeAdapter[JsonValue](JsonValue).validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}:" if mark else ":"
        raise ConfigError(f"{source}:{place} not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: only texts, numbers, true/false, null and lists may be values") from error


def _known(name: str, *, source: str) -> str:
    """The name, if it is a setting. Else the nearest one is by the whole name, or by its last part alone."""
    settings = all_settings()
    if name in settings:
        return name
    last = name.rpartition(".")[2]
    by_key = {setting.rpartition(".")[2]: setting for setting in settings}
    near = difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    near_key = [by_key[key] for key in difflib.get_close_matches(last, by_key, n=1, cutoff=0.6)]
    sections = difflib.get_close_matches(name, {setting.split(".")[0] for setting in settings}, n=1)
    guess = (near or near_key or [f"{section}:" for section in sections] or [""])[0]
    hint = f"did you mean {guess}?" if guess else "configs/default.yaml and docs/operator-settings.md have all settings"
    raise ConfigError(f"{source}: there is no setting {name!r}; {hint}")


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """One sentence per setting, whatever the number of alternatives that its type has."""
    reasons: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        name = next((n for n in (".".join(path[:2]), *path[:1]) if n in all_settings()), path[0])
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if name not in KEY_VARIABLES.values() and problem["type"] != "value_error":
            reason += f", not {problem['input']!r}"
        reasons.setdefault(name, []).append(reason)
    lines = []
    for name, alternatives in reasons.items():
        source = sources.get(name) or ", ".join({v: 1 for k, v in sources.items() if k.startswith(f"{name}.")})
        lines.append(f"{source}: {name}: {_join(alternatives)}")
    return "; ".join(lines)


def _join(reasons: list[str]) -> str:
    """ "must be A, not X", "must be B, not X" -> "must be A or must be B, not X"."""
    heads = dict.fromkeys(reason.rpartition(", not ")[0] or reason for reason in reasons)
    tail = reasons[0].removeprefix(next(iter(heads)))
    return " or ".join(heads) + tail


if __name__ == "__main__":
    page = operators_page() if sys.argv[1:] == ["operators"] else default_yaml()
    sys.exit(print_all(page))
