"""The model that a newcomer meets: the engine's greedy text is transformers' own, token for token."""

import asyncio
import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig
from engine.loading.default_model import ensure_model
from engine.loading.gguf.header import read_gguf_header
from engine.loading.gguf.tensors import gguf_config, gguf_stored_weights, gguf_weights
from engine.models.registry import build_model
from engine.quantization.linear import KeptMatrix
from engine.quantization.method import COMPILED_FORMATS, has_float16_weights, make_methods
from engine.types import Request, SamplingParams
from server.text.chat_renderer import ChatRenderer
from server.text.tokenizer import Tokenizer

PROMPTS = [
    "Name three birds of prey.",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "List the planets.",
    "Once upon a time",
    "2 + 2 =",
    "你好",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
]
NUM_TOKENS = 24
Section = dict[str, str]


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """The same file's weights in transformers' own Llama."""
    header = read_gguf_header(ensure_model(report=lambda phase, detail: None))
    config = LlamaConfig(**vars(gguf_config(header, implementation="own")))
    model = LlamaForCausalLM(config).eval()
    weights = dict(gguf_weights(header))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def with_rounded_linears(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """What float16 storage makes of the linear layers; the embedding, whose matrix the last one shares, stays exact."""
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(module.weight.half().float())
    return model


def encode_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Every other one as a chat."""
    prompts, renderer = list(PROMPTS), ChatRenderer()
    for i in range(1, len(prompts), 2):
        rendering = tokenizer.render_chat(
            renderer,
            [{"role": "user", "content": prompts[i]}],
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
        prompts[i] = asyncio.run(rendering)
    renderer.close()
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]


def generate(model: Section, *, kernels: str, method: str) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's prompts and greedy outputs, all in one batch."""
    config = EngineConfig.model_validate(
        {
            "model": model,
            "speculation": {"method": method},
            "device": {"name": "cpu", "kernels": kernels, "num_threads": 1},
            "kv_cache": {"memory": "4096tokens"},
        }
    )
    engine, model = build_engine(config, lambda phase, detail: None)
    prompts = encode_prompts(Tokenizer(model.tokenizer))
    for i, prompt_ids in enumerate(prompts):
        params = SamplingParams(seed=0, temperature=0.0, max_tokens=NUM_TOKENS)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt_ids, params=params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step()[0]:
            outputs[int(output.request_id)] += output.token_ids
    return prompts, outputs


def continuation(reference: LlamaForCausalLM, prompt: list[int], output: list[int]) -> list[int]:
    """What the reference takes for likeliest after each beginning of the answer.

    It equals `output` exactly if greedy generation does: both agree on the first token, hence on the second, and so on.
    """
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + output[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()


EXACT, HALF, DEFAULT = {"dtype": "float32", "quantization": "none"}, {"dtype": "float32", "quantization": "fp16"}, {}
needs_fbgemm = pytest.mark.skipif(not has_float16_weights(), reason="no FBGEMM")


@pytest.mark.parametrize(
    ("kernels", "model", "methods"),
    [
        ("torch", EXACT, ("none", "ngram")),
        pytest.param("torch", HALF, ("ngram",), marks=needs_fbgemm),
        ("numba", EXACT, ("ngram",)),
        ("numba", DEFAULT, ("none",)),  # the file's own four bits, and a float16 cache
    ],
)
def test_greedy_text_equals_transformers(
    reference: LlamaForCausalLM, kernels: str, model: Section, methods: tuple[str, ...]
) -> None:
    if model == HALF:
        reference = with_rounded_linears(reference)
    for method in methods:
        prompts, outputs = generate(model, kernels=kernels, method=method)
        for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True):
            assert len(output) == NUM_TOKENS
            assert output == continuation(reference, prompt, output), (method, text)


def test_the_default_keeps_its_matrices_in_the_bits_of_the_file(reference: LlamaForCausalLM) -> None:
    header = read_gguf_header(ensure_model(report=lambda phase, detail: None))
    model = build_model(gguf_config(header), dtype=torch.float32, methods=make_methods(COMPILED_FORMATS, "fp16"))
    model.load_weights(gguf_stored_weights(header))
    kept = {name: module for name, module in model.named_modules() if isinstance(module, KeptMatrix)}
    assert {module.describe() for module in kept.values()} <= {"int4", "int8"}
    for number in (0, len(reference.model.layers) - 1):
        theirs = reference.model.layers[number]
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            expected = theirs.get_submodule(name).weight
            assert torch.equal(kept[f"layers.{number}.{name}"].dense(), expected), name
    assert torch.equal(kept["lm_head"].dense(slice(4096)), reference.lm_head.weight[:4096])
