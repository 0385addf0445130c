"""Settings: one schema, few of them, and errors that say what to do."""

import difflib
import random
import re
from typing import get_args

import pytest
import yaml

from engine.config import EngineConfig
from server.config import MAX_DEFAULT_SETTINGS, Config
from server.settings import (
    ConfigError,
    Layer,
    all_settings,
    default_yaml,
    flatten,
    load_config,
    operators_page,
    read_assignments,
    read_environment,
    read_file,
    value_of,
)
from tests import ROOT

CONFIGS = ROOT / "configs"


def test_there_are_few_settings():
    everybody = [setting for setting in all_settings().values() if not setting.for_operators]
    assert 20 < len(everybody) <= MAX_DEFAULT_SETTINGS == 40


def test_every_setting_is_described():
    assert all(len(setting.description) > 10 for setting in all_settings().values())


def test_the_default_file_has_every_setting_with_its_default_but_those_for_operators():
    path = CONFIGS / "default.yaml"
    assert path.read_text() == default_yaml(), "run: python -m server.settings > configs/default.yaml"
    layer = read_file(path)
    assert list(layer.values) == [name for name, setting in all_settings().items() if not setting.for_operators]
    assert load_config([layer]).config == Config()


def test_the_operators_page_has_every_setting_that_is_theirs():
    path = CONFIGS.parent / "docs" / "operator-settings.md"
    assert path.read_text() == operators_page(), "run: python -m server.settings operators > docs/operator-settings.md"
    named = re.findall(r"^\| `([a-z_.]+)`", path.read_text(), re.MULTILINE)
    assert named == [name for name, setting in all_settings().items() if setting.for_operators]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_way_to_run_can_be_loaded(path):
    loaded = load_config([read_file(path)])
    assert set(loaded.sources.values()) == {str(path)}


def test_a_config_survives_yaml():
    config = load_config(
        [
            read_file(CONFIGS / "production.yaml"),
            read_assignments(["server.api_keys=[a, b]", "model.max_model_len=99", "kv_cache.memory=2GiB"]),
        ]
    ).config
    again = load_config([Layer("yaml", flatten(yaml.safe_load(yaml.safe_dump(config.model_dump())), source="yaml"))])
    assert again.config == config


def test_only_the_engine_s_part_crosses_to_its_process():
    config = load_config([read_assignments(["server.api_keys=secret", "model.dtype=float32"])]).config
    text = config.engine_config().model_dump_json()
    assert '"dtype":"float32"' in text
    assert "secret" not in text
    assert set(yaml.safe_load(text)) == set(EngineConfig.model_fields)


def test_a_misspelt_setting_is_answered_with_the_right_one():
    generator = random.Random(0)
    for name in all_settings():
        place = generator.randrange(name.rfind(".") + 1, len(name))
        misspelt = name[:place] + name[place + 1 :]  # a letter is missing
        if misspelt in all_settings() or not misspelt.rpartition(".")[2]:
            continue
        near = difflib.get_close_matches(misspelt, all_settings(), n=1)[0]
        with pytest.raises(
            ConfigError, match=re.escape(f"--set: there is no setting '{misspelt}'; did you mean {near}?")
        ):
            read_assignments([f"{misspelt}=1"])


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("max_num_seqs=4", "did you mean scheduler.max_num_seqs?"),
        ("serverr.port=4", "did you mean server.port?"),
        ("sampling.zzz=4", "configs/default.yaml and docs/operator-settings.md have all settings"),
        ("server=4", "there is no setting 'server'"),
        ("server.port", "write --set server.port=VALUE"),
        ("server.port=[", "--set server.port: line 1: not valid YAML"),
    ],
)
def test_assignments_that_make_no_sense_are_refused(assignment, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        read_assignments([assignment])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("server:\n  prt: 1\n", "there is no setting 'server.prt'; did you mean server.port?"),
        ("servr:\n  port: 1\n", "there is no setting 'servr'; did you mean server:?"),
        ("server: 3\n", "server is a section; indent its settings below it"),
        ("- server\n", "must have sections"),
        ("server:\n  port: [1\n", "line 3: not valid YAML"),
        ("server:\n  port: 2020-01-01\n", "only texts, numbers"),
        ("model:\n  dtype: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_files_that_make_no_sense_are_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}:")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_file(path)


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("server.port=65536", "server.port: must be less than or equal to 65535, not 65536"),
        ("server.port=-1", "greater than or equal to 0"),
        ("server.strict=maybe", "server.strict: must be a valid boolean"),
        ("server.shutdown_timeout=-0.1", "greater than or equal to 0"),
        ("server.api_keys=['']", "server.api_keys: String should have at least 1 character"),
        ("limits.max_queued_requests=0", "greater than or equal to 1"),
        ("limits.max_n=129", "less than or equal to 128"),
        ("limits.max_stop_strings=17", "less than or equal to 16"),
        ("limits.request_timeout=0", "greater than 0"),
        ("model.max_model_len=0", "greater than or equal to 1 or must be 'auto', not 0"),
        ("kv_cache.block_size=257", "less than or equal to 256"),
        ("speculation.num_drafts=65", "less than or equal to 64"),
        ("model.path=[a]", "model.path: must be a valid string"),
    ],
)
def test_values_one_past_their_bounds_are_refused(assignment, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        load_config([read_assignments([assignment])])
    assert str(caught.value).startswith("--set: ")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("server.port=65535", 65535),
        ("server.port=0", 0),
        ("server.shutdown_timeout=0", 0),
        ("limits.max_queued_requests=1", 1),
        ("limits.max_n=128", 128),
        ("limits.max_stop_strings=16", 16),
        ("limits.max_stop_strings=0", 0),
        ("limits.request_timeout=null", None),
        ("model.max_model_len=auto", "auto"),
        ("kv_cache.memory=0.9", "0.9"),  # a number is fine where a text is meant
        ("server.served_model_name=one", ["one"]),  # so is one where several are meant
        ("server.api_keys=[1234]", ["1234"]),
    ],
)
def test_values_at_their_bounds_are_taken(assignment, value):
    loaded = load_config([read_assignments([assignment])])
    assert value_of(loaded.config, assignment.partition("=")[0]) == value


def test_every_wrong_value_is_named_with_where_it_came_from():
    with pytest.raises(ConfigError) as caught:
        load_config([Layer("a.yaml", {"server.port": -1, "seed": "x"}), Layer("--dtype", {"model.dtype": "int3"})])
    message = str(caught.value)
    assert "a.yaml: server.port: " in message
    assert "a.yaml: seed: " in message
    assert "--dtype: model.dtype: " in message


def test_keys_are_never_part_of_a_complaint():
    with pytest.raises(ConfigError) as caught:
        load_config([Layer("--set", {f"server.{name}": {"key": "secret"} for name in ("api_keys", "operator_keys")})])
    assert "secret" not in str(caught.value)


def test_the_environment_has_keys_or_nothing():
    assert read_environment({}) == []
    assert read_environment({"PEREGRINE_API_KEY": " , ", "PEREGRINE_OPERATOR_KEY": ""}) == []
    loaded = load_config(read_environment({"PEREGRINE_API_KEY": "a, b", "PEREGRINE_OPERATOR_KEY": "c"}))
    assert (loaded.config.server.api_keys, loaded.config.server.operator_keys) == (["a", "b"], ["c"])
    assert loaded.sources["server.operator_keys"] == "PEREGRINE_OPERATOR_KEY"


def test_the_model_s_name_does_not_show_where_it_lies(tmp_path):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "tiny.gguf").touch()

    def names(path: str) -> list[str]:
        return load_config([Layer("MODEL", {"model.path": path})]).config.model_names()

    assert names(str(tmp_path / "my-model")) == ["my-model"]
    assert names(str(tmp_path / "tiny.gguf")) == ["tiny"]
    assert names("org/model") == ["org/model"]
    assert load_config([read_assignments(["server.served_model_name=[a, b]"])]).config.model_names() == ["a", "b"]


def _takes_booleans(setting):
    return setting.info.annotation is bool or bool in get_args(setting.info.annotation)


@pytest.mark.parametrize("name", [name for name, one in all_settings().items() if not _takes_booleans(one)])
def test_true_is_no_number(name):
    """Python counts it as 1, which a setting would take for a limit of one."""
    with pytest.raises(ConfigError, match="neither a number nor a name"):
        load_config([Layer("a file", {name: True})])
