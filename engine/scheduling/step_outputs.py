"""The output of a step for one request."""

from __future__ import annotations

from engine.batch.pooling import pooled_vector
from engine.types import RequestTiming, Sampled, Sequence, StepOutput


def one_more_token(seq: Sequence, result: Sampled) -> StepOutput:
    """The output for one token in the middle of an answer, without what other outputs of the request tell."""
    return StepOutput(request_id=seq.request.request_id, token_ids=result.token_ids, logprobs=result.logprobs)


def output_of(seq: Sequence, token_ids: list[int], result: Sampled, now: float) -> StepOutput:
    """The complete output. token_ids: those of the step that count; now: time.monotonic()"""
    return StepOutput(
        request_id=seq.request.request_id,
        token_ids=token_ids,
        finish_reason=seq.finish_reason,
        stop_token_id=seq.stop_token_id,
        logprobs=result.logprobs[: len(token_ids)] if result.logprobs is not None else None,
        prompt_logprobs=result.prompt_logprobs,
        num_cached_tokens=seq.num_cached_tokens,
        timing=_timing(seq, now),
        pooled=pooled_vector(seq) if result.error is None else None,
        error=result.error,
        error_kind=result.error_kind,
    )


def _timing(seq: Sequence, now: float) -> RequestTiming:
    scheduled_at = now if seq.first_scheduled_at is None else seq.first_scheduled_at
    first_token_at = now if seq.first_token_at is None else seq.first_token_at
    return RequestTiming(
        queued=scheduled_at - seq.added_at,
        prefill=first_token_at - scheduled_at,
        decode=now - first_token_at,
        num_prefill_chunks=seq.num_prefill_chunks,
        num_preemptions=seq.num_preemptions,
        num_drafts=seq.num_drafts,
        num_accepted_drafts=seq.num_accepted_drafts,
    )
