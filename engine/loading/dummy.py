"""Random weights and a tokenizer for them: the shape and speed of a model, without its files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from engine.ipc.messages import TokenizerAssets

_NUM_BYTES = 256


def fill_with_random_weights(model: nn.Module, seed: int) -> None:
    """Normal weights with a deviation of 1 / sqrt(inputs), so that activations neither fade nor blow up with depth.

    Norms are ones and biases zeros. The same seed gives the same weights on the same kind of device.
    """
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator(parameter.device).manual_seed(seed * 1_000_003 + number)
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1.0)


def byte_tokenizer(vocab_size: int) -> TokenizerAssets:
    """One token per byte; ids past the bytes stand for themselves in text, as <256>, <257>, ..."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == _NUM_BYTES
    tokens = alphabet[:vocab_size] + [f"<{index}>" for index in range(_NUM_BYTES, vocab_size)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerAssets(tokenizer_json=tokenizer.to_str(), chat_template=None, special_tokens={})
