"""What is written into config.json: the library's own fields, and patterns that name each layer once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.compression.quantization_config import quantization_config
from engine.compression.weight_scheme import WeightScheme

CONFIGS = json.loads(Path(__file__).with_name("oracles").joinpath("configs.json").read_text())
SCHEMES = {
    "int4": WeightScheme(4, 32, observer="mse"),
    "int8 zero points": WeightScheme(8, 64, is_symmetric=False),
    "fp8": WeightScheme(8, is_float=True),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_what_the_library_writes(name: str) -> None:
    """`oracles/make_config.py` had it written."""
    assert quantization_config({"model.layers.0.mlp.up_proj": SCHEMES[name]}, ["lm_head"]) == CONFIGS[name]


def targets_of(schemes: dict[str, WeightScheme]) -> dict[int, list[str]]:
    groups = quantization_config(schemes, [])["config_groups"]
    assert isinstance(groups, dict)
    return {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}


def test_every_layer_is_named_by_the_patterns_of_its_format_alone() -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(13) for kind in ("self_attn.q_proj", "mlp.down_proj")]
    names += [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(13) for e in range(3)]
    bits = {name: (4, 6, 8)[(7 * int(name.split(".")[2]) + len(name.split(".")[4])) % 3] for name in names}
    targets = targets_of({name: WeightScheme(bits[name], 32) for name in names})
    assert sum(map(len, targets.values())) <= 9
    for name in names:
        matching = {
            width for width, patterns in targets.items() for one in patterns if re.match(one.removeprefix("re:"), name)
        }
        assert matching == {bits[name]}, name


def test_one_format_is_that_of_all_linear_layers() -> None:
    assert targets_of({"model.layers.0.mlp.up_proj": WeightScheme(4, 32)}) == {4: ["Linear"]}
