"""The model that a newcomer meets: the engine's greedy text is transformers' own, token for token."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig
from engine.models.default_model import ensure_model
from engine.models.gguf_file import gguf_config, gguf_weights
from engine.models.gguf_header import read_gguf_header
from engine.types import Request, SamplingParams
from server.tokenizer import Tokenizer

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


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """The same file's weights in transformers' own Llama."""
    header = read_gguf_header(ensure_model(report=lambda phase, detail: None))
    config = LlamaConfig(**gguf_config(header, implementation="own").to_dict())
    model = LlamaForCausalLM(config).eval()
    weights = dict(gguf_weights(header, torch.float32))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_greedy_text_equals_transformers(reference, method):
    config = EngineConfig.model_validate(
        {"speculation": {"method": method}, "device": {"num_threads": 1}, "kv_cache": {"memory": "4096tokens"}}
    )
    engine, model = build_engine(config, lambda phase, detail: None)
    tokenizer = Tokenizer(model.tokenizer)
    chats = [
        tokenizer.render_chat(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
        for text in PROMPTS
    ]
    prompts = [chat if i % 2 else text for i, (chat, text) in enumerate(zip(chats, PROMPTS, strict=True))]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    for i, prompt_ids in enumerate(ids):
        params = SamplingParams(seed=0, temperature=0.0, max_tokens=NUM_TOKENS)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt_ids, params=params))
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(ids))}
    while engine.has_work:
        for output in engine.step()[0]:
            outputs[output.request_id] += output.token_ids
    for i, prompt_ids in enumerate(ids):
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt_ids]),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt_ids) :].tolist()
        assert outputs[str(i)] == expected, PROMPTS[i]
