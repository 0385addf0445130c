"""From the fields of a request to the engine's sampling parameters."""

from __future__ import annotations

import hashlib
import re
import secrets

from engine.grammar import GrammarSpec
from engine.ipc.messages import ModelInfo
from engine.types import SamplingParams
from server.config import Config
from server.errors import bad_request
from server.off_loop import off_lock
from server.protocol.request_fields import RequestFields
from server.text.tokenizer import LONG_TEXT, Tokenizer

INTEGER = re.compile(r"-?[0-9]{1,20}")
GREEDY_BELOW = 1e-5  # dividing float32 logits by less than this may overflow, and chooses the most likely token anyway
SEED_BITS = 63
MAX_GRAMMAR_BYTES = 1 << 24  # of all choices of a request
MAX_PARAMETER_VALUES = 1 << 19  # of all choices of a request: some milliseconds to encode


def make_params(
    body: RequestFields,
    model: ModelInfo,
    *,
    bad_words: list[list[int]],
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: GrammarSpec | None = None,
) -> SamplingParams:
    """The parameters that all choices of a request share; each then gets its own seed. Raises ApiError 400.

    bad_words: of `read_bad_words`; grammar: of `server.structured.request_grammar`
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(f"min_tokens ({min_tokens}) is above max_tokens ({max_tokens})", param="min_tokens")
    allowed = _allowed_token_ids(body.allowed_token_ids, model.vocab_size)
    stop_token_ids = _stop_token_ids(body, model)
    _check_first_token(allowed, bad_words, stop_token_ids if min_tokens else [], vocab_size=model.vocab_size)
    defaults = model.generation_defaults
    temperature = _default(body.temperature, defaults, "temperature", 1.0)
    return SamplingParams(
        seed=body.seed or 0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_default(body.top_p, defaults, "top_p", 1.0),
        top_k=max(int(_default(body.top_k, defaults, "top_k", 0)), 0),
        min_p=_default(body.min_p, defaults, "min_p", 0.0),
        frequency_penalty=_default(body.frequency_penalty, defaults, "frequency_penalty", 0.0),
        presence_penalty=_default(body.presence_penalty, defaults, "presence_penalty", 0.0),
        repetition_penalty=_default(body.repetition_penalty, defaults, "repetition_penalty", 1.0),
        logit_bias=_logit_bias(body, model.vocab_size),
        allowed_token_ids=allowed,
        bad_words=bad_words,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_drafts=_num_drafts(body),
        grammar=grammar,
    )


async def read_bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The token sequences that spell a word at the beginning of a text and, with a space before it, inside one."""
    if not words:
        return []
    texts = list(dict.fromkeys(text for word in words for text in (word, " " + word.lstrip())))
    is_long = sum(map(len, texts)) >= LONG_TEXT
    spelt = await off_lock(tokenizer.encode_all, texts) if is_long else tokenizer.encode_all(texts)
    return [list(token_ids) for token_ids in dict.fromkeys(map(tuple, spelt)) if token_ids]


def check_parameters(params: SamplingParams, num_choices: int) -> None:
    """Refuses lists that are too long for all choices: each choice sends them to the engine. Raises ApiError 400."""
    num_bytes = 0 if params.grammar is None else len(params.grammar.text)
    if num_bytes * num_choices > MAX_GRAMMAR_BYTES:
        raise bad_request(
            f"{num_choices} choices that each follow a grammar of {num_bytes} bytes are more than the "
            f"{MAX_GRAMMAR_BYTES} bytes of one request; ask for fewer choices at once, or simplify it",
            param="n",
        )
    num_values = len(params.allowed_token_ids or ()) + len(params.logit_bias) + len(params.stop_token_ids)
    num_values += sum(map(len, params.bad_words))
    if num_values * num_choices > MAX_PARAMETER_VALUES:
        raise bad_request(
            f"{num_choices} choices that each have {num_values} entries in allowed_token_ids, logit_bias, bad_words "
            f"and stop_token_ids are more than the {MAX_PARAMETER_VALUES} of one request; ask for fewer choices at "
            "once, or name fewer tokens",
            param="n",
        )


def check_priority(priority: int | None, config: Config) -> None:
    if priority and not config.limits.priority:
        raise bad_request(
            f"priority is {priority}, but this server serves first come, first served; leave it out, or ask its "
            "operator for limits.priority",
            param="priority",
        )


def check_limits(body: RequestFields, config: Config) -> None:
    """The configured limits of the shared fields. Raises ApiError 400 with both numbers and the limit's name."""
    limits = config.limits
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    _at_most(body.n or 1, limits.max_n, "n", "limits.max_n")
    _at_most(len(stops), limits.max_stop_strings, "stop", "limits.max_stop_strings")
    _at_most(len(body.logit_bias or {}), limits.max_logit_bias, "logit_bias", "limits.max_logit_bias")
    _at_most(body.prompt_logprobs or 0, limits.max_logprobs, "prompt_logprobs", "limits.max_logprobs")


def check_num_logprobs(num_logprobs: int | None, config: Config, *, param: str) -> None:
    _at_most(num_logprobs or 0, config.limits.max_logprobs, param, "limits.max_logprobs")


def check_num_prompts(num_prompts: int, config: Config) -> None:
    _at_most(num_prompts, config.limits.max_prompts, "prompt", "limits.max_prompts")


def check_num_inputs(num_inputs: int, config: Config, *, param: str) -> None:
    _at_most(num_inputs, config.limits.max_embedding_inputs, param, "limits.max_embedding_inputs")


def choice_seeds(seed: int | None, num_choices: int) -> list[int]:
    """A seed for each choice of one prompt.

    The first has the request's own, the others a hash of it and their number: what a choice says depends on nothing
    else. Without a seed all are random.
    """
    if seed is None:
        return [secrets.randbits(SEED_BITS) for _ in range(num_choices)]
    return [seed % 2**SEED_BITS, *(_derived_seed(seed, number) for number in range(1, num_choices))]


def _derived_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def _at_most(value: int, limit: int, param: str, setting: str) -> None:
    if value > limit:
        raise bad_request(f"{param}: {value} is more than the {limit} that {setting} allows", param=param)


def _default(value: float | None, defaults: dict[str, float], name: str, fallback: float) -> float:
    return value if value is not None else defaults.get(name, fallback)


def _logit_bias(body: RequestFields, vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in (body.logit_bias or {}).items():
        if not INTEGER.fullmatch(key):
            raise bad_request(f"logit_bias: {key[:50]!r} is not a token id", param="logit_bias")
        if not 0 <= int(key) < vocab_size:
            raise bad_request(
                f"logit_bias: token id {key} is outside the vocabulary of {vocab_size} tokens", param="logit_bias"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            message = f"logit_bias: the bias of token {key} must be a number from -100 to 100"
            raise bad_request(message, param="logit_bias")
        biases[int(key)] = float(bias)
    return biases


def _allowed_token_ids(listed: list[object] | None, vocab_size: int) -> list[int] | None:
    """The allowed ids, each once, ascending. The cost is bounded by the vocabulary, whatever the body holds."""
    if listed is None:
        return None
    param = "allowed_token_ids"
    if len(listed) > vocab_size:
        message = f"{param}: {len(listed)} entries are more than the {vocab_size} tokens of the vocabulary"
        raise bad_request(message, param=param)
    token_ids = [token for token in listed if type(token) is int]  # which leaves out booleans
    if len(token_ids) < len(listed):
        raise bad_request(f"{param}: every entry must be a token id, an integer", param=param)
    if min(token_ids) < 0:
        raise bad_request(f"{param}: {min(token_ids)} is no token id", param=param)
    return _checked_ids(sorted(set(token_ids)), param, vocab_size)


def _checked_ids(token_ids: list[int] | None, param: str, vocab_size: int) -> list[int] | None:
    if token_ids and max(token_ids) >= vocab_size:
        raise bad_request(
            f"{param}: token id {max(token_ids)} is outside the vocabulary of {vocab_size} tokens", param=param
        )
    return token_ids


def _check_first_token(
    allowed: list[int] | None, bad_words: list[list[int]], stop_token_ids: list[int], *, vocab_size: int
) -> None:
    """Refuses constraints that leave no token to begin with, whatever the prompt is.

    stop_token_ids: those that min_tokens forbids at first. Bad words of several tokens may leave none later on, which
    only the engine can see.
    """
    banned = {word[0] for word in bad_words if len(word) == 1}.union(stop_token_ids)
    tokens = range(vocab_size) if allowed is None else allowed
    if len(tokens) > len(banned) or any(token not in banned for token in tokens):
        return
    param = "bad_words" if allowed is None else "allowed_token_ids"
    raise bad_request(
        f"{param}: no token is left to begin with: all {len(tokens)} that are allowed are bad_words, or end the text, "
        "which min_tokens forbids; loosen one of them",
        param=param,
    )


def _stop_token_ids(body: RequestFields, model: ModelInfo) -> list[int]:
    asked = _checked_ids(body.stop_token_ids, "stop_token_ids", model.vocab_size) or []
    return list(dict.fromkeys(asked if body.ignore_eos else [*asked, *model.eos_token_ids]))


def _num_drafts(body: RequestFields) -> int | None:
    if body.speculation is None:
        return None
    return 0 if body.speculation.enabled is False else body.speculation.num_drafts
