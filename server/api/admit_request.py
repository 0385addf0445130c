"""Admission of a generation request: the steps between body and generation that completions and chat share."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import msgspec
from fastapi import Request as HttpRequest

from engine.ipc.messages import ModelInfo
from engine.types import Request, SamplingParams
from server.errors import ApiError, bad_request
from server.generation.choice import Choice
from server.generation.generation import Generation, Job
from server.generation.prompts import Prompt
from server.generation.sampling_params import check_limits, check_parameters, check_priority, choice_seeds
from server.protocol.body import ignored_fields, ignored_header, refuse_ignored
from server.protocol.request_fields import Body, RequestFields
from server.state import ServerState
from server.telemetry.request_record import RequestRecord
from server.text.detokenizer import TextOptions
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer

_NUMBERS = count()  # of the requests of this process
MILLISECONDS = re.compile(r"[0-9]{1,10}")
MAX_TIMEOUT = 86400.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An accepted request: the model and tenant that it is for, its ids and deadline, and the headers of its answer."""

    state: ServerState
    model: ModelInfo
    tokenizer: Tokenizer
    request_id: str
    tenant: str
    salt: str
    deadline: float | None  # the event loop's time, seconds
    headers: dict[str, str]


def make_record(request: HttpRequest) -> RequestRecord:
    """The record of a request that has just come, to be entered before anything of it is read."""
    state: ServerState = request.app.state.server
    return RequestRecord(state.metrics, state.history, request.state)


def accept(request: HttpRequest, body: RequestFields, *, arrived_at: float) -> Serving:
    """Checks what needs no prompt. Raises ApiError: 400, 404 for the model, 503 while there is none."""
    state: ServerState = request.app.state.server
    headers = check_known(body, strict=state.config.server.strict or bool(body.strict))
    model, tokenizer = served_model(state, body.model)
    check_limits(body, state.config)
    check_priority(body.priority, state.config)
    return Serving(
        state=state,
        model=model,
        tokenizer=tokenizer,
        request_id=_request_id(request, body),
        tenant=str(request.state.tenant),
        salt=_salt(str(request.state.tenant), body.cache_salt),
        deadline=_deadline(request, body, state, arrived_at),
        headers=headers,
    )


def check_known(body: Body, *, strict: bool) -> dict[str, str]:
    """The header that names the fields that are ignored, if there are any. Raises ApiError 400 in strict mode."""
    ignored = ignored_fields(body)
    if strict:
        refuse_ignored(ignored)
    return {"x-ignored-fields": ignored_header(ignored)} if ignored else {}


def served_model(state: ServerState, name: str | None) -> tuple[ModelInfo, Tokenizer]:
    """Raises ApiError 404 if the name is not one that is served, 503 while the model is not there."""
    if name is not None and name not in state.model_names:
        message = f"there is no model {name[:200]!r}; this server has {', '.join(state.model_names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    state.admission.check_available()
    model, tokenizer = state.engine.model, state.tokenizer
    if model is None or tokenizer is None:
        raise ApiError(503, "the model is loading; GET /readyz tells when it is ready", code="starting")
    return model, tokenizer


def make_generation(
    serving: Serving, body: RequestFields, prompts: Sequence[Prompt], params: SamplingParams, *,
    id_prefix: str, record: RequestRecord, scores_only: bool = False,
) -> Generation:  # fmt: skip
    """Makes the choices of a request. Raises ApiError 400 if no queue could take them."""
    num_choices = body.n or 1
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts) * num_choices
    serving.state.admission.check_size(len(prompts) * num_choices, num_tokens)
    check_parameters(params, len(prompts) * num_choices)
    response_id = f"{id_prefix}-{serving.request_id}"
    text = _text_options(body, params)
    asked_stop_ids = frozenset(body.stop_token_ids or ())
    unique = f"{response_id}.{next(_NUMBERS)}"  # a retry, or another tenant, may have the id of one that has not ended
    choices: list[Choice] = []
    for prompt in prompts:
        for seed in choice_seeds(body.seed, num_choices):
            engine_request = Request(
                request_id=f"{unique}.{len(choices)}",
                prompt_token_ids=prompt.token_ids,
                params=msgspec.structs.replace(params, seed=seed),
                priority=body.priority or 0,
                tenant=serving.tenant,
                tenant_weight=serving.state.keys.terms_of(serving.tenant).weight,
                cache_salt=serving.salt,
            )
            choice = Choice(
                index=len(choices),
                prompt=prompt,
                request=engine_request,
                text=text,
                asked_stop_ids=asked_stop_ids,
                scores_only=scores_only,
            )
            choices.append(choice)
    job = Job(
        response_id=response_id,
        request_id=serving.request_id,
        tenant=serving.tenant,
        model=body.model,
        created=int(time.time()),
        fingerprint=serving.model.fingerprint,
        choices=choices,
        choices_per_prompt=num_choices,
        deadline=serving.deadline,
    )
    return Generation(
        job,
        engine=serving.state.engine,
        tokenizer=serving.tokenizer,
        admission=serving.state.admission,
        active_requests=serving.state.active_requests,
        record=record,
    )


def _request_id(request: HttpRequest, body: RequestFields) -> str:
    """The header's id wins over the body's, and that over the one that was made up; the answer's header shows it."""
    if body.request_id is not None and request.headers.get("x-request-id") != request.state.request_id:
        request.state.request_id = body.request_id
    return str(request.state.request_id)


def _text_options(body: RequestFields, params: SamplingParams) -> TextOptions:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return TextOptions(
        stop=StopStrings(list(dict.fromkeys(stops))),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=params.min_tokens,
        skip_special_tokens=body.skip_special_tokens is not False,
        spaces_between_special_tokens=body.spaces_between_special_tokens is not False,
    )


def _salt(tenant: str, cache_salt: str | None) -> str:
    """The salt of the prefix cache: made of tenant and `cache_salt`, such that no client can name another tenant's."""
    if cache_salt is None:
        return tenant
    return hashlib.blake2b(f"{len(tenant)}:{tenant}{cache_salt}".encode(), digest_size=16).hexdigest()


def _deadline(request: HttpRequest, body: RequestFields, state: ServerState, arrived_at: float) -> float | None:
    """The deadline, in the event loop's time: the earlier of the body's and the header's, else the server's own."""
    seconds = [value for value in (body.timeout, _header_timeout(request)) if value is not None]
    if not seconds and state.config.limits.request_timeout is not None:
        seconds = [state.config.limits.request_timeout]
    if not seconds:
        return None
    return asyncio.get_running_loop().time() + min(seconds) - (time.monotonic() - arrived_at)


def _header_timeout(request: HttpRequest) -> float | None:
    text = request.headers.get("x-request-timeout-ms")
    if text is None:
        return None
    if not MILLISECONDS.fullmatch(text) or not 0 < int(text) <= MAX_TIMEOUT * 1000:
        raise bad_request(
            f"x-request-timeout-ms must be a whole number of milliseconds, from 1 to {MAX_TIMEOUT * 1000:.0f}, "
            f"not {text[:50]!r}",
            param="x-request-timeout-ms",
        )
    return int(text) / 1000
