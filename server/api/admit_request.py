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

from engine.grammar import GrammarSpec
from engine.ipc.messages import ModelInfo
from engine.types import Pooling, Request, SamplingParams
from server.errors import ApiError, bad_request
from server.generation.choice import Choice
from server.generation.generation import Generation, Job
from server.generation.prompts import Prompt
from server.generation.sampling_params import check_limits, check_parameters, check_priority, choice_seeds
from server.parsing.answer_shape import PLAIN_SHAPE, AnswerShape
from server.protocol.body import ignored_fields, ignored_header, refuse_ignored
from server.protocol.request_fields import Body, RequestFields
from server.state import ServerState
from server.structured.request_grammar import read_grammar
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
    is_background: bool = False  # a line of a batch, which runs when nothing else does

    async def read_grammar(self, body: RequestFields) -> GrammarSpec | None:
        """What the answer must follow. Raises ApiError where that cannot be enforced."""
        return await read_grammar(body, self.state.grammar_checker, model=self.model, tokenizer=self.tokenizer)


@dataclass(frozen=True, slots=True)
class Reading:
    """How what the engine says is read. scores_only: no token of it; pooling: one vector of it, and no token

    shape: how its text is taken apart
    """

    scores_only: bool = False
    shape: AnswerShape = PLAIN_SHAPE
    pooling: Pooling | None = None

    @property
    def has_no_text(self) -> bool:
        return self.scores_only or self.pooling is not None


WHOLE = Reading()


def make_record(request: HttpRequest) -> RequestRecord:
    """The record of a request that has just come, to be entered before anything of it is read."""
    state: ServerState = request.app.state.server
    return RequestRecord(state.metrics, state.history, request.state)


def accept(request: HttpRequest, body: RequestFields, *, arrived_at: float, ignored: Sequence[str] = ()) -> Serving:
    """Checks what needs no prompt. Raises ApiError: 400, 404 for the model, 503 while there is none, 429 without room.

    A server that has more than it can do must be quick to say no: before it reads a prompt.
    ignored: what of another API's body has no counterpart in `body`
    """
    state: ServerState = request.app.state.server
    headers = check_known(body, strict=state.config.server.strict or bool(body.strict), others=ignored)
    model, tokenizer = served_model(state, body.model)
    check_limits(body, state.config)
    check_priority(body.priority, state.config)
    is_background = _is_background(request)
    if not is_background:
        state.admission.check_room(str(request.state.tenant))
    return Serving(
        state=state,
        model=model,
        tokenizer=tokenizer,
        request_id=_request_id(request, body),
        tenant=str(request.state.tenant),
        salt=_salt(str(request.state.tenant), body.cache_salt),
        deadline=_deadline(request, body, state, arrived_at),
        headers=headers,
        is_background=is_background,
    )


def check_known(body: Body, *, strict: bool, others: Sequence[str] = ()) -> dict[str, str]:
    """The header that names the fields that are ignored, if there are any. Raises ApiError 400 in strict mode."""
    ignored = [*others, *ignored_fields(body)]
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
    id_prefix: str, record: RequestRecord, reading: Reading = WHOLE,
) -> Generation:  # fmt: skip
    """Makes the choices of a request. Raises ApiError 400 if no queue could take them. id_prefix: of the answer's id"""
    num_choices = body.n or 1
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts) * num_choices
    serving.state.admission.check_size(len(prompts) * num_choices, num_tokens)
    check_parameters(params, len(prompts) * num_choices)
    response_id = f"{id_prefix}{serving.request_id}"
    text = _text_options(body, params, reading)
    asked_stop_ids = frozenset(body.stop_token_ids or ())
    unique = f"{response_id}.{next(_NUMBERS)}"  # a retry, or another tenant, may have the id of one that has not ended
    queueing = _queueing(serving, body)
    choices: list[Choice] = []
    for prompt in prompts:
        for seed in choice_seeds(body.seed, num_choices):
            engine_request = Request(
                request_id=f"{unique}.{len(choices)}",
                prompt_token_ids=prompt.token_ids,
                params=msgspec.structs.replace(params, seed=seed),
                priority=queueing.priority,
                tenant=queueing.tenant,
                tenant_weight=queueing.weight,
                cache_salt=serving.salt,
                pooling=reading.pooling,
                is_background=serving.is_background,
            )
            choice = Choice(
                index=len(choices),
                prompt=prompt,
                request=engine_request,
                text=text,
                asked_stop_ids=asked_stop_ids,
                scores_only=reading.has_no_text,
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
        shape=reading.shape,
        is_background=serving.is_background,
    )
    return Generation(
        job,
        engine=serving.state.engine,
        tokenizer=serving.tokenizer,
        admission=serving.state.admission,
        active_requests=serving.state.active_requests,
        record=record,
    )


@dataclass(frozen=True, slots=True)
class Queueing:
    """How the engine queues a request: behind whom, and with whose share."""

    priority: int
    tenant: str
    weight: float


def _queueing(serving: Serving, body: RequestFields) -> Queueing:
    """A batch is a tenant of its own, so that what its key asks for meanwhile does not pay for it, and so that it makes
    room: it has a small share, and gets the rest while nobody else wants it."""
    weight = serving.state.keys.terms_of(serving.tenant).weight
    if not serving.is_background:
        return Queueing(body.priority or 0, serving.tenant, weight)
    batches = serving.state.config.batches
    priority = batches.priority + max(body.priority or 0, 0)
    return Queueing(priority, f"batches of {serving.tenant}", weight * batches.share)


def _is_background(request: HttpRequest) -> bool:
    return bool(getattr(request.state, "is_background", False))


def _request_id(request: HttpRequest, body: RequestFields) -> str:
    """The header's id wins over the body's, and that over the one that was made up; the answer's header shows it."""
    if body.request_id is not None and request.headers.get("x-request-id") != request.state.request_id:
        request.state.request_id = body.request_id
    return str(request.state.request_id)


def _text_options(body: RequestFields, params: SamplingParams, reading: Reading) -> TextOptions:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return TextOptions(
        stop=StopStrings(list(dict.fromkeys(stops))),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=params.min_tokens,
        skip_special_tokens=body.skip_special_tokens is not False,
        spaces_between_special_tokens=body.spaces_between_special_tokens is not False,
        tells_special_tokens=bool(reading.shape.hidden_tokens),
    )


def _salt(tenant: str, cache_salt: str | None) -> str:
    """The salt of the prefix cache: made of tenant and `cache_salt`, such that no client can name another tenant's."""
    if cache_salt is None:
        return tenant
    return hashlib.blake2b(f"{len(tenant)}:{tenant}{cache_salt}".encode(), digest_size=16).hexdigest()


def _deadline(request: HttpRequest, body: RequestFields, state: ServerState, arrived_at: float) -> float | None:
    """The deadline, in the event loop's time: the earlier of the body's and the header's, else the server's own."""
    seconds = [value for value in (body.timeout, _header_timeout(request)) if value is not None]
    if not seconds and state.config.limits.request_timeout is not None and not _is_background(request):
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
