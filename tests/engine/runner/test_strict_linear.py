"""Products of a fixed number of rows: a row's bits do not depend on what is multiplied beside it."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from engine.models.moe import SparseMLP
from engine.models.operations import load_operations
from engine.models.registry import build_model
from engine.runner.strict_linear import FixedRows, fix_rows

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
}


class _Places(nn.Linear):
    """A product that sums its first row in another order than the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        out[0] += 1e-3
        return out


def _model(config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


def test_every_number_of_rows_is_cut_into_blocks_of_one_size() -> None:
    sizes: list[int] = []
    linear = nn.Linear(6, 3)
    linear.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    fixed = FixedRows(linear, 8)
    x = torch.randn(20, 6)
    for num_rows in (1, 7, 8, 9, 20):
        sizes.clear()
        torch.testing.assert_close(fixed(x[:num_rows]), linear(x[:num_rows]))
        assert sizes[:-1] == [8] * -(-num_rows // 8)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MixtralConfig(**SIZES, num_local_experts=4)])
def test_all_products_of_a_model_are_fixed_once(config: PreTrainedConfig) -> None:
    model = _model(config)
    fix_rows(model, num_rows=4)
    products = [module for module in model.modules() if isinstance(module, FixedRows)]
    is_sparse = isinstance(config, MixtralConfig)
    assert len(products) == 2 * (3 if is_sparse else 4) + 1  # a mixture of experts is one
    assert not any(isinstance(inner, FixedRows) for one in products for inner in one.module.modules())


def test_a_row_has_the_same_bits_in_any_company() -> None:
    """A mixture too, whose tokens share tiles with whoever likes the same expert."""
    model = _model(MixtralConfig(**SIZES, num_local_experts=4))
    operations = load_operations("torch")
    model.operations = operations
    fix_rows(model, num_rows=4)
    x = torch.randn(11, 48)
    product = model.layers[0].self_attn.qkv_proj
    whole = product(x)
    for row in range(11):
        assert torch.equal(product(x[row : row + 1])[0], whole[row])
    mixture = model.layers[1].mlp
    assert isinstance(mixture.module, SparseMLP)
    torch.testing.assert_close(mixture(x, operations), mixture.module(x, operations))


def test_products_that_depend_on_a_row_s_place_are_refused() -> None:
    model = _model(LlamaConfig(**SIZES))
    for layer in model.layers:
        layer.mlp.down_proj = _Places(80, 48)
    with pytest.raises(ValueError, match=r"80 inputs and 48 outputs .* set device.determinism to fast"):
        fix_rows(model, num_rows=4)
