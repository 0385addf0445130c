"""Random weights and a tokenizer for them: the shape and speed of a model, without its files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.ipc.messages import TokenizerAssets
from engine.models.model import Model

_NUM_BYTES = 256


def fill_with_random_weights(model: Model, seed: int) -> None:
    """Normal weights with a deviation of 1 / sqrt(inputs), so that activations neither fade nor blow up with depth.

    Norms are ones and biases zeros. The same seed gives the same weights on the same kind of device. Each is made when
    those before it are in their final layout.
    """
    device = torch.get_default_device()
    for number, (name, shape) in enumerate([(name, p.shape) for name, p in model.named_parameters()]):
        parameter = model.get_parameter(name)
        values = torch.empty(shape, dtype=parameter.dtype, device=device) if parameter.is_meta else parameter
        with torch.no_grad():
            if len(shape) > 1:
                generator = torch.Generator(values.device).manual_seed(seed * 1_000_003 + number)
                values.normal_(0.0, shape[-1] ** -0.5, generator=generator)
            else:
                values.fill_(1.0 if name.endswith("weight") else 0.0)
        model.fill(name, values)
        del parameter, values  # while the next ones are made, the memory of these is free


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
