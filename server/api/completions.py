"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from server.api.admit_request import Reading, Serving, accept, make_generation, make_record
from server.api.echo import Echo, read_echoes
from server.api.token_logprobs import TokenNames, completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from server.errors import ApiError, bad_request
from server.generation.choice import Choice, Delta
from server.generation.generation import Generation
from server.generation.prompts import PromptOptions, read_prompts, split_prompts
from server.generation.sampling_params import check_num_logprobs, check_num_prompts, make_params, read_bad_words
from server.generation.streaming import deliver, deliver_stream
from server.generation.usage import StreamUsage
from server.protocol.body import read_body
from server.protocol.openapi import replies, request_body
from server.protocol.request_fields import CompletionBody
from server.protocol.responses import Completion, CompletionChoice, CompletionLogprobs, ErrorReply, Usage, error_reply
from server.telemetry.request_record import RequestRecord

router = APIRouter()
DEFAULT_MAX_TOKENS = 16


@router.post(
    "/v1/completions",
    response_model=None,
    responses=replies(Completion, streams=True),
    openapi_extra=request_body(CompletionBody),
)
async def create_completion(request: Request) -> Response:
    """Continues one or several prompts."""
    with make_record(request) as record:
        body = await read_body(request, CompletionBody)
        serving = accept(request, body, arrived_at=record.started_at)
        generation = await _prepare(body, serving, record)
        echoes = await _read_echoes(body, generation, serving)
        writer = CompletionWriter(body, generation, serving, echoes)
        send = deliver_stream if body.stream else deliver
        return await send(request, generation, writer, headers=serving.headers)


async def _prepare(body: CompletionBody, serving: Serving, record: RequestRecord) -> Generation:
    config = serving.state.config
    inputs = split_prompts(body.prompt)
    check_num_prompts(len(inputs), config)
    check_num_logprobs(body.logprobs, config, param="logprobs")
    num_choices, max_tokens = body.n or 1, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.best_of is not None and body.best_of != num_choices:
        raise bad_request(
            f"best_of ({body.best_of}) must be equal to n ({num_choices}), or left out: no choices are discarded",
            param="best_of",
        )
    if max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0, which needs echo: true (it scores the prompt)", param="max_tokens")
    options = PromptOptions(
        max_tokens=max_tokens,
        add_special_tokens=body.add_special_tokens is not False,
        truncate_to=body.truncate_prompt_tokens,
        keeps_beginning=body.truncation_side == "right",
    )
    prompts = await read_prompts(inputs, options, tokenizer=serving.tokenizer, model=serving.model)
    params = make_params(
        body,
        serving.model,
        bad_words=await read_bad_words(body.bad_words or [], serving.tokenizer),
        max_tokens=max(max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=_num_scored(body),
        grammar=await serving.read_grammar(body),
    )
    return make_generation(
        serving, body, prompts, params, id_prefix="cmpl-", record=record, reading=Reading(max_tokens == 0)
    )


async def _read_echoes(body: CompletionBody, generation: Generation, serving: Serving) -> list[Echo]:
    """The echo of each prompt; an empty list where the body asks for none."""
    if not body.echo:
        return []
    prompts = [choice.prompt for choice in generation.job.choices[:: generation.job.choices_per_prompt]]
    has_special = body.add_special_tokens is not False
    return await read_echoes(prompts, serving.tokenizer, add_special_tokens=has_special)


def _num_scored(body: CompletionBody) -> int | None:
    """How many log-probabilities per prompt token the engine must tell: those of an echo, or those asked for."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((number for number in wanted if number is not None), default=None)


class CompletionWriter:
    """Formats the answers of one request as OpenAI's completions."""

    def __init__(
        self, body: CompletionBody, generation: Generation, serving: Serving, echoes: Sequence[Echo] = ()
    ) -> None:
        """echoes: of each prompt, where they were asked for."""
        self._body = body
        self._generation = generation
        self._echoes = echoes
        self._names = TokenNames(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._usage = StreamUsage(body.stream_options, generation)
        self._num_ended = 0

    def chunks(self, delta: Delta) -> Iterator[Completion]:
        self._usage.count(delta)
        yield self._completion([self._choice(delta)], usage=self._usage.of_chunk(), has_timing=self._is_last(delta))

    def text_chunk(self, index: int, text: str) -> Completion | None:
        body = self._body
        if body.logprobs is not None or body.return_token_ids or self._usage.is_continuous:
            return None
        choice = CompletionChoice(index=index, text=text)
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = None
        return self._completion([choice], usage=self._usage.of_chunk(), has_timing=False)

    def last_chunk(self) -> Completion | None:
        usage = self._usage.of_end()
        return None if usage is None else self._completion([], usage=usage, has_timing=False)

    def failure(self, error: ApiError) -> Iterator[ErrorReply]:
        yield error_reply(error)

    def reply(self, choices: list[Delta]) -> Completion:
        worded = [self._choice(delta) for delta in choices]
        return self._completion(worded, usage=self._generation.usage(), has_timing=True)

    def _completion(
        self, choices: list[CompletionChoice], *, usage: Usage | UnsetType | None, has_timing: bool
    ) -> Completion:
        job = self._generation.job
        return Completion(
            id=job.response_id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=choices,
            usage=usage,
            timing=self._generation.timing() if has_timing and self._body.timing else UNSET,
        )

    def _is_last(self, delta: Delta) -> bool:
        self._num_ended += delta.finish_reason is not None
        return delta.finish_reason is not None and self._num_ended == len(self._generation.job.choices)

    def _choice(self, delta: Delta) -> CompletionChoice:
        choice = self._generation.job.choices[delta.index]
        echo = self._echo(delta)
        worded = CompletionChoice(
            index=delta.index,
            text=echo.text + delta.text if echo is not None and delta.is_first else delta.text,
            logprobs=self._logprobs(delta, choice, echo),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            worded.token_ids = delta.token_ids
            worded.prompt_token_ids = choice.prompt.token_ids if delta.is_first else None
        num_top = self._body.prompt_logprobs
        if num_top is not None:
            scored = delta.prompt_logprobs
            worded.prompt_logprobs = prompt_logprobs(scored, self._names, num_top=num_top) if delta.is_first else None
        return worded

    def _echo(self, delta: Delta) -> Echo | None:
        if not self._body.echo:
            return None
        return self._echoes[delta.index // self._generation.job.choices_per_prompt]

    def _logprobs(self, delta: Delta, choice: Choice, echo: Echo | None) -> CompletionLogprobs | None:
        num_top = self._body.logprobs
        if num_top is None:
            return None
        start = len(echo.text) if echo is not None else 0
        offsets = [start + offset for offset in delta.offsets]
        own = completion_logprobs(delta.logprobs, offsets, self._names, num_top=num_top)
        if echo is None or not delta.is_first:
            return own
        prompt_ids = choice.prompt.token_ids
        return joined(echoed_logprobs(prompt_ids, delta.prompt_logprobs, self._names, num_top=num_top, echo=echo), own)
