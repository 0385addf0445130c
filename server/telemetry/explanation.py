"""Why a request was slow: its timeline, the steps of that time and earlier prompts, as one sentence and numbers."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from server.telemetry.flight_recorder import FlightRecorder, Interval, RecordedStep
from server.telemetry.request_timeline import Ahead, RequestHistory, Timeline

WORTH_TELLING = 0.01  # share of the time to the first token; what took less is not mentioned
FULL_KV_CACHE = 0.9  # owned share, from which on a wait is put down to memory


class Seconds(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time went. null: it has not come to that, or the engine did not say."""

    total: float
    time_to_first_token: float | None
    before_queue: float | None  # reading the body, the chat template, tokens
    queued: float | None
    prefill: float | None
    delivery: (
        float | None
    )  # the rest until the first token: between the processes, text; a restarted engine's first try
    decode: float | None
    longest_pause: float | None  # between two tokens


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """What was ahead of it when it came, and what the steps were like that it waited for."""

    requests_ahead: int
    prompt_tokens_ahead: int
    requests_running: int
    max_requests_running: int
    max_kv_cache_usage: float


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    cached_tokens: int
    computed_tokens: int
    chunks: int | None
    shared_tokens: int  # with which an earlier prompt, still remembered, begins as well; of the first prompt
    shared_with: str | None  # that request's id


class Output(msgspec.Struct, frozen=True, kw_only=True):
    choices: int
    tokens: int
    seconds_per_token: float | None
    drafts_proposed: int
    drafts_accepted: int


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    id: str  # of the answer; of a refused request the caller's, or the one that it was given
    object: str = "request.explanation"
    request_id: str
    state: str  # waiting, running, ended or refused
    outcome: str | None
    status: int | None
    error: str | None
    sentence: str
    seconds: Seconds
    queue: Queue | None
    prompt: Prompt | None
    output: Output | None
    preemptions: int
    restarts_survived: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What bounds requests here: seats in the batch, tokens per KV block, and whether prefixes are kept."""

    max_num_seqs: int | None
    block_size: int
    prefix_caching: bool


def explain(
    timeline: Timeline, history: RequestHistory, recorder: FlightRecorder, circumstances: Circumstances, now: float
) -> Explanation:
    """now: seconds, time.monotonic"""
    return _Explainer(timeline, history, recorder, circumstances, now).explanation()


class _Explainer:
    def __init__(
        self,
        timeline: Timeline,
        history: RequestHistory,
        recorder: FlightRecorder,
        circumstances: Circumstances,
        now: float,
    ) -> None:
        timeline.refresh()
        self.timeline, self.recorder, self.circumstances = timeline, recorder, circumstances
        self.now = now
        self.admitted = timeline.admitted
        self.end = now if timeline.ended_at is None else timeline.ended_at
        self.seconds = _seconds(timeline, self.end)
        self.shared, self.closest = history.longest_shared_prefix(timeline)
        self.waited = recorder.between(*self._wait())

    def _wait(self) -> tuple[float, float]:
        """The moments between which it was queued."""
        start = self.timeline.admitted_at
        if start is None:
            return self.now, self.now
        return start, self.end if self.seconds.queued is None else start + self.seconds.queued

    def explanation(self) -> Explanation:
        timeline = self.timeline
        timing = timeline.timing or timeline.first_timing
        return Explanation(
            id=timeline.response_id or timeline.request_id,
            request_id=timeline.request_id,
            state=self.state,
            outcome=timeline.outcome or None,
            status=timeline.status,
            error=timeline.error or None,
            sentence=self.sentence(),
            seconds=self.seconds,
            queue=self._queue(),
            prompt=self._prompt(),
            output=self._output(),
            preemptions=timing.num_preemptions if timing is not None else 0,
            restarts_survived=timeline.num_restarts,
        )

    @property
    def state(self) -> str:
        if self.admitted is None:
            return "refused"
        if self.timeline.ended_at is not None:
            return "ended"
        return "running" if self.timeline.first_token_at is not None else "waiting"

    def _queue(self) -> Queue | None:
        if self.admitted is None:
            return None
        ahead = self.admitted.ahead
        return Queue(
            requests_ahead=ahead.num_waiting,
            prompt_tokens_ahead=ahead.num_waiting_tokens,
            requests_running=ahead.num_running,
            max_requests_running=self.waited.max_num_running,
            max_kv_cache_usage=self.waited.max_kv_usage,
        )

    def _prompt(self) -> Prompt | None:
        if self.admitted is None:
            return None
        num_cached = self.timeline.counts.num_cached_tokens
        first = self.timeline.first_timing
        return Prompt(
            tokens=self.admitted.num_prompt_tokens,
            cached_tokens=num_cached,
            computed_tokens=self.admitted.num_prompt_tokens - num_cached,
            chunks=first.num_prefill_chunks if first is not None else None,
            shared_tokens=self.shared,
            shared_with=self.closest.response_id if self.closest is not None else None,
        )

    def _output(self) -> Output | None:
        if self.admitted is None:
            return None
        counts = self.timeline.counts
        per_token = None
        if self.seconds.decode is not None and counts.num_output_tokens > self.admitted.num_choices:
            per_token = self.seconds.decode * self.admitted.num_choices
            per_token /= counts.num_output_tokens - self.admitted.num_choices
        return Output(
            choices=self.admitted.num_choices,
            tokens=counts.num_output_tokens,
            seconds_per_token=per_token,
            drafts_proposed=counts.num_accepted_drafts + counts.num_rejected_drafts,
            drafts_accepted=counts.num_accepted_drafts,
        )

    def sentence(self) -> str:
        timeline = self.timeline
        total = _time(self.seconds.total)
        if self.admitted is None:
            return f"Refused after {total} with {timeline.status} ({timeline.outcome}): {timeline.error}"
        parts = [self._until_first_token(self.admitted.ahead), *self._after_first_token()]
        if timeline.ended_at is not None:
            parts.append(f"ended after {total} with {timeline.status} ({timeline.outcome})")
        return "; ".join(parts) + (f": {timeline.error}" if timeline.error else "")

    def _until_first_token(self, ahead: Ahead) -> str:
        seconds = self.seconds
        to_first = seconds.time_to_first_token
        if to_first is None:
            verb = "No token came" if self.timeline.ended_at is not None else "No token has come yet"
            return f"{verb} in {_time(seconds.total)}: {self._queued_behind(ahead)}"
        has_died = self.timeline.num_restarts > 0
        parts = [
            (seconds.queued, f"queued{self._behind(ahead)}"),
            (seconds.prefill, f"prefill of {self._computed()}"),
            (seconds.before_queue, "before the queue (body, chat template, tokens)"),
            (seconds.delivery, "with an engine process that died" if has_died else "from the engine to the answer"),
        ]
        told = [
            f"{_time(length)} {what}"
            for length, what in parts
            if length is not None and (length >= WORTH_TELLING * to_first or length is seconds.prefill)
        ]
        return f"TTFT {_time(to_first)}: {', '.join(told) or 'the engine did not say what for'}"

    def _queued_behind(self, ahead: Ahead) -> str:
        if not ahead.num_waiting and not ahead.num_running:
            return "nothing was ahead of it"
        return f"queued{self._behind(ahead)}"

    def _behind(self, ahead: Ahead) -> str:
        """Behind whom, and for what."""
        behind = ""
        if ahead.num_waiting:
            tokens = _count(ahead.num_waiting_tokens, "token")
            behind = f" behind {_count(ahead.num_waiting, 'request')} ({tokens})"
        waited = self.waited
        if not waited.num_steps:
            return behind + (f" while {_count(ahead.num_running, 'request')} ran" if ahead.num_running else "")
        seats = self.circumstances.max_num_seqs
        ran = f" while {_count(waited.max_num_running, 'request')} ran"
        if seats is not None and waited.max_num_running >= seats:
            return f"{behind}{ran}, as many as may (scheduler.max_num_seqs)"
        if waited.max_kv_usage >= FULL_KV_CACHE:
            return f"{behind}{ran}, with {waited.max_kv_usage:.0%} of the KV cache taken"
        return behind + ran

    def _computed(self) -> str:
        assert self.admitted is not None
        first = self.timeline.first_timing
        num_cached = self.timeline.counts.num_cached_tokens
        text = _count(self.admitted.num_prompt_tokens - num_cached, "token")
        if first is not None and first.num_prefill_chunks > 1:
            text += f" in {first.num_prefill_chunks} steps"
        return f"{text}{self._beside()} ({num_cached:,} cached{self._broken_prefix(num_cached)})"

    def _beside(self) -> str:
        timeline, first = self.timeline, self.timeline.first_timing
        if first is None or timeline.first_token_at is None:
            return ""
        during = self.recorder.between(timeline.first_token_at - first.prefill, timeline.first_token_at)
        others = round(during.mean_num_seqs) - 1
        return f" beside {_count(others, 'other')}" if others > 0 else ""

    def _broken_prefix(self, num_cached: int) -> str:
        """Why no more of the prompt was cached, where that can be known."""
        assert self.admitted is not None
        size = self.circumstances.block_size
        num_tokens = len(self.timeline.prompt)
        if self.admitted.needs_all:
            return f"; {self.admitted.needs_all} every token computed"
        if not self.circumstances.prefix_caching:
            return "; kv_cache.prefix_caching is off"
        if num_cached >= num_tokens - size - 1 or num_cached > self.shared + size:  # the latter: of an earlier answer
            return ""
        if self.closest is None or self.shared < size:
            return "; no earlier prompt begins like it"
        if self.shared >= num_cached + 2 * size:
            return f"; {self.closest.response_id} begins with the same {self.shared:,}, which are no longer cached"
        if self.shared < num_tokens:
            return f"; the prefix broke at token {self.shared:,}, until where {self.closest.response_id} is the same"
        return ""

    def _after_first_token(self) -> list[str]:
        output, seconds, timeline = self._output(), self.seconds, self.timeline
        parts = []
        if output is not None and output.seconds_per_token is not None and seconds.decode is not None:
            text = f"then {_count(output.tokens - output.choices, 'token')} in {_time(seconds.decode)}"
            parts.append(f"{text} ({_time(output.seconds_per_token)} each{self._drafts(output)}{self._pause(output)})")
        timing = timeline.timing or timeline.first_timing
        if timing is not None and timing.num_preemptions:
            parts.append(f"preempted {_count(timing.num_preemptions, 'time')} for lack of KV blocks, and recomputed")
        if timeline.num_restarts:
            parts.append(f"{_count(timeline.num_restarts, 'restart')} of the engine survived")
        return parts

    def _drafts(self, output: Output) -> str:
        if not output.drafts_proposed:
            return ""
        return f", {output.drafts_accepted:,} of {output.drafts_proposed:,} drafts accepted"

    def _pause(self, output: Output) -> str:
        """The longest pause, where it stands out, and what ran in it."""
        begun_at, length = self.timeline.pause
        if output.seconds_per_token is None or length < 3 * output.seconds_per_token:
            return ""
        during = self.recorder.between(begun_at, begun_at + length)
        return f", the longest pause {_time(length)}{_in_step(during, length)}"


def _seconds(timeline: Timeline, end: float) -> Seconds:
    """The parts add up: what the engine says of its own is taken as it is, and the rest is delivery."""
    first, last = timeline.first_timing, timeline.timing
    to_first = before = queued = prefill = delivery = decode = None
    if timeline.admitted_at is not None:
        before = timeline.admitted_at - timeline.arrived_at
    told = first if first is not None else last
    if told is not None:
        queued, prefill = told.queued, told.prefill
    if timeline.first_token_at is not None:
        to_first = timeline.first_token_at - timeline.arrived_at
        decode = end - timeline.first_token_at
        if before is not None and queued is not None and prefill is not None:
            delivery = max(to_first - before - queued - prefill, 0.0)
    return Seconds(
        total=end - timeline.arrived_at,
        time_to_first_token=to_first,
        before_queue=before,
        queued=queued,
        prefill=prefill,
        delivery=delivery,
        decode=decode,
        longest_pause=timeline.pause[1] or None,
    )


def _in_step(during: Interval, length: float) -> str:
    step = during.longest
    if step is None:
        return ", in which no step ended"
    if step.stats.seconds < length / 2:
        return f", over {_count(during.num_steps, 'step')}"
    return f", in {_described(step)}"


def _described(step: RecordedStep) -> str:
    stats = step.stats
    prompts = f", {stats.num_prompt_tokens:,} of them of prompts" if stats.num_prompt_tokens else ""
    return f"a step of {_count(stats.num_tokens, 'token')}{prompts}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    if seconds >= 0.0995:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.0095 else f"{1000 * seconds:.1f} ms"


def _count(number: int, noun: str) -> str:
    shown = f"{number / 1000:.0f}k" if number >= 10_000 else f"{number:,}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"
