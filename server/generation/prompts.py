"""Prompts: from the forms that the API allows to token ids that fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from engine.ipc.messages import ModelInfo
from server.errors import bad_request
from server.off_loop import off_lock
from server.text.tokenizer import LONG_TEXT, Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # as the client wrote it; None if it came as ids or was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """max_tokens: output tokens that must fit behind the prompt; None: at least one."""

    max_tokens: int | None
    add_special_tokens: bool
    truncate_to: int | None  # keep so many tokens; -1: as many as fit
    keeps_beginning: bool = False  # of a prompt that is cut, instead of its end
    param: str = "prompt"
    limit_param: str = "max_tokens"  # the field that the client set it with
    samples: bool = True  # False: no token follows, and a prompt may fill the context

    @property
    def num_reserved(self) -> int:
        """Tokens that must fit behind the prompt. Scoring a prompt samples one, too."""
        return max(self.max_tokens or 1, 1) if self.samples else 0


PromptInput = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def split_prompts(prompt: PromptInput) -> list[str | list[int]]:
    """The single prompts of the four forms that the API allows."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [cast(list[int], prompt)]
    return cast(list[str | list[int]], prompt)


async def read_prompts(
    prompts: Sequence[str | list[int]], options: PromptOptions, *, tokenizer: Tokenizer, model: ModelInfo
) -> list[Prompt]:
    """Encodes the prompts and checks that each fits. Raises ApiError 400 with the numbers."""

    def read() -> list[Prompt]:
        return [_read_prompt(prompt, options, tokenizer, model) for prompt in prompts]

    return await off_lock(read) if sum(map(len, prompts)) >= LONG_TEXT else read()


def _read_prompt(prompt: str | list[int], options: PromptOptions, tokenizer: Tokenizer, model: ModelInfo) -> Prompt:
    num_kept = _num_kept(options, model)
    num_read = model.max_model_len + 1 if num_kept is None else min(num_kept, model.max_model_len + 1)
    is_whole, text = True, None
    if isinstance(prompt, str):
        _check_length(prompt, options, tokenizer, model)
        token_ids, is_whole = tokenizer.encode_part(
            prompt,
            num_read,  # one more than fits is too long, whatever comes behind it
            add_special_tokens=options.add_special_tokens,
            from_end=num_kept is not None and not options.keeps_beginning,
        )
        text = prompt if is_whole else None
    else:
        token_ids = prompt
    check_vocabulary(token_ids, model, param=options.param)
    if num_kept is not None and len(token_ids) > num_kept:
        token_ids = token_ids[:num_kept] if options.keeps_beginning else token_ids[-num_kept:]
        text = None
    _check_fits(token_ids, options, model, is_whole=is_whole or num_kept == num_read)
    return Prompt(token_ids, text)


def _num_kept(options: PromptOptions, model: ModelInfo) -> int | None:
    if options.truncate_to == -1:
        return max(model.max_model_len - options.num_reserved, 1)
    if options.truncate_to == 0:
        raise bad_request("truncate_prompt_tokens must be at least 1, or -1", param="truncate_prompt_tokens")
    return options.truncate_to


def _check_length(text: str, options: PromptOptions, tokenizer: Tokenizer, model: ModelInfo) -> None:
    """Refuses what cannot fit before it is encoded, which takes a second per megabyte."""
    longest = model.max_model_len * tokenizer.max_token_characters
    if options.truncate_to is None and len(text) > longest:
        raise bad_request(
            f"This model's maximum context length is {model.max_model_len} tokens, and the prompt is too long for it: "
            f"{len(text)} characters, where so many tokens hold at most {longest}; shorten it, or set "
            "truncate_prompt_tokens",
            param=options.param,
            code="context_length_exceeded",
        )


def check_vocabulary(token_ids: list[int], model: ModelInfo, *, param: str) -> None:
    """Refuses ids beyond the model's vocabulary: a client's, or a tokenizer's added tokens that the model lacks."""
    highest = max(token_ids, default=0)
    if highest >= model.vocab_size:
        raise bad_request(f"token id {highest} is outside the vocabulary of {model.vocab_size} tokens", param=param)


def _check_fits(token_ids: list[int], options: PromptOptions, model: ModelInfo, *, is_whole: bool) -> None:
    num_prompt, num_output, context = len(token_ids), options.max_tokens, model.max_model_len
    if not token_ids:
        raise bad_request(
            "the prompt is empty: it has no tokens, and this model does not begin with one of its own",
            param=options.param,
        )
    num_needed = num_prompt + options.num_reserved
    if num_needed <= context:
        return
    if not options.samples:
        raise bad_request(
            f"This model's maximum context length is {context} tokens, and the text is too long for it: "
            f"{'' if is_whole else 'at least '}{num_prompt} tokens; shorten it, or set truncate_prompt_tokens",
            param=options.param,
            code="context_length_exceeded",
        )
    wanted = f"the {num_output} that {options.limit_param} asks for" if num_output else "at least 1 to be written"
    at_least = "" if is_whole else "at least "
    raise bad_request(
        f"This model's maximum context length is {context} tokens, and the prompt is too long for it: "
        f"{at_least}{num_prompt} tokens and {wanted} make {num_needed}; shorten the prompt or lower "
        f"{options.limit_param}",
        param=options.param,
        code="context_length_exceeded",
    )
