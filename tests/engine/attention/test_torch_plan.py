"""How a step is cut into products of equal sizes."""

import pytest

from engine.attention.torch_plan import rounded_context


@pytest.mark.parametrize("block_size", [1, 4, 16, 24, 256])
def test_padding_is_bounded_and_whole_blocks(block_size: int) -> None:
    for num_tokens in range(1, 5000):
        rounded = rounded_context(num_tokens, block_size)
        assert rounded >= num_tokens
        assert rounded % block_size == 0
        assert rounded <= max(64, 2 * num_tokens) + block_size
