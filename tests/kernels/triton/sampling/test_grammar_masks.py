"""Packed masks against their definition."""

import pytest
import torch

from kernels.reference import sampling as reference
from kernels.triton.sampling import grammar_masks


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("num_masked", [0, 1, 4])
def test_masks_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, vocab_size: int, num_masked: int) -> None:
    monkeypatch.setattr(grammar_masks, "_TOKENS_AT_ONCE", 64)
    generator = torch.Generator().manual_seed(vocab_size + num_masked)
    logits = torch.randn(5, vocab_size, generator=generator)
    logits[1, 0] = torch.nan
    rows = torch.randperm(5, generator=generator)[:num_masked]
    size = (num_masked, (vocab_size + 31) // 32 + 1)  # tokens that the model does not have
    words = torch.randint(-(2**31), 2**31, size, generator=generator).int()
    expected, found = logits.clone(), logits.clone()
    reference.apply_masks(expected, rows, words)
    grammar_masks.apply_masks(found, rows, words)
    assert torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))
    for mask, row in enumerate(rows.tolist()):
        bits = [int(words[mask, token // 32]) >> (token % 32) & 1 for token in range(vocab_size)]
        assert (found[row] == -torch.inf).tolist() == [bit == 0 for bit in bits]
