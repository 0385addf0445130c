"""The data types of the engine: requests, sequences, the items of a step, and outputs.

Messages are frozen msgspec structs and cross the process border; `Sequence` and `Scheduled` stay inside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec

from engine.grammar import GrammarSpec

if TYPE_CHECKING:
    from engine.arrays import Doubles  # numpy takes a tenth of a second, and the server imports this file

FinishReason = Literal["stop", "length", "error"]
Pooling = Literal["last", "mean"]  # of the hidden states of a prompt: that of its last token, or all of them
ErrorKind = Literal["request", "constraints"]  # it failed, or what the client allows leaves no token to go on with


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request's tokens are chosen. Values were validated by whoever made it; the engine trusts them.

    The seed is always set, so that a replay is the same request.
    """

    seed: int
    max_tokens: int
    min_tokens: int = 0  # no stop token is sampled before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # over output tokens
    presence_penalty: float = 0.0  # over output tokens
    repetition_penalty: float = 1.0  # over prompt and output tokens
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[list[int]] = []  # token sequences that must not be completed
    stop_token_ids: list[int] = []  # end of sequence included, unless the request ignores it
    logprobs: int | None = None  # None: off; n: the sampled token's and the n most likely
    prompt_logprobs: int | None = None
    num_drafts: int | None = None  # at most; None, or more than configured: as configured; 0: no speculation
    grammar: GrammarSpec | None = None  # that the output follows


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asks for."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []  # already emitted: empty, unless the engine died
    priority: int = 0  # lower runs first
    tenant: str = ""  # whose it is: tenants get fair shares of a busy engine
    tenant_weight: float = 1.0  # of its share
    cache_salt: str = ""  # requests share cached prefixes only with the same salt
    pooling: Pooling | None = None  # one vector is wanted, and no token: it ends with its prompt
    is_background: bool = False  # nobody waits for it: it counts in no limit of the queue that others meet


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's untouched logits."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_token_ids: list[int]
    top_logprobs: list[float]


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went inside the engine so far, in seconds. Together: the time since it was added."""

    queued: float
    prefill: float
    decode: float
    num_prefill_chunks: int
    num_preemptions: int
    num_drafts: int
    num_accepted_drafts: int


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one request. The last one has a finish reason."""

    request_id: str
    token_ids: list[int] = []  # 1 to k + 1; may be empty where only prompt log-probabilities came or at an error
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # which stop token ended it; it is the last of `token_ids`
    logprobs: list[TokenLogprobs] | None = None  # one per token id, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # for the prompt tokens that this step scored, in order
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; not where only a token more is said
    timing: RequestTiming | None = None  # up to here; not where only a token more is said
    pooled: bytes | None = None  # the vector of a request with `pooling`: [hidden_size] float32, little-endian
    error: str | None = None  # with finish reason "error"
    error_kind: ErrorKind = "request"  # of `error`


DEGRADED_MODES = ("token_budget", "run_ahead", "cuda_graphs", "speculation")


DraftOutcome = Literal["", "drafted", "no_guess", "unlikely", "too_slow", "failed"]  # of proposing after a step
DRAFT_OUTCOMES: tuple[DraftOutcome, ...] = ("drafted", "no_guess", "unlikely", "too_slow", "failed")


PromptLimit = Literal["", "none", "target", "least"]  # of the prompts' part of a step beside streams, with a target
PROMPT_LIMITS: tuple[PromptLimit, ...] = ("none", "target", "least")


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step in numbers, for the metrics. Times in seconds, sizes in tokens or blocks."""

    num_tokens: int
    num_seqs: int
    num_running: int
    num_waiting: int
    schedule: float
    forward: float
    sample: float
    update: float
    propose: float
    num_blocks: int
    num_owned_blocks: int
    num_cached_blocks: int  # free, but still holding a prefix that may be reused
    num_preemptions: int  # in this step
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache in this step
    num_prefix_hits: int  # prompt tokens found there
    num_drafts: int  # sequences that carried drafts
    num_draft_tokens: int
    accepted_by_position: list[int]  # accepted draft tokens of this step, by draft position
    bytes_moved: int  # weights and KV read, as the model's arithmetic demands; 0 where a request of the step failed
    flops: int
    num_output_tokens: int = 0  # that requests got in this step
    num_first_prompt_tokens: int = 0  # prompt tokens that were computed for those of them whose first token it is
    is_queued: bool = False  # the forward pass only queued its work, and sampling waited for it
    draft_outcome: DraftOutcome = ""  # what the proposer made for the next step; empty: nobody was to be drafted for
    started_at: float = 0.0  # time.monotonic, which is the same clock in every process of the machine
    num_prompt_tokens: int = 0  # of `num_tokens`: chunks of sequences that lack more than their newest token
    degraded_modes: list[str] = []  # of DEGRADED_MODES, what steps do without for now, because it has failed
    predicted: float = 0.0  # seconds that the step was expected to take; 0: nothing is predicted
    prompt_limit: PromptLimit = ""  # what ended the prompts' part; empty: no target, no streams, or no prompts

    @property
    def seconds(self) -> float:
        """All of the step."""
        return self.schedule + self.forward + self.sample + self.update + self.propose

    @property
    def computing(self) -> float:
        """Seconds that the model's arithmetic took, at most."""
        return self.forward + self.sample if self.is_queued else self.forward


@dataclass(eq=False, slots=True, weakref_slot=True)  # proposers keep what they know of a sequence while it lives
class Sequence:
    """A request inside the engine.

        token_ids        [ prompt .......... | output ...... ]
        computed         [ in the KV cache ......... ]
        drafts                                         ( a tree of guesses )

    A step computes the tokens that are not computed yet, drafts included. `draft_parents[i]` is the index of the
    draft that draft i follows, or -1 where it follows the newest token; parents come before their children, so a
    chain is [-1, 0, 1, ...].
    """

    request: Request
    token_ids: list[int]
    arrival: int = 0  # order of arrival, kept across preemptions
    max_num_tokens: int = 0  # of prompt and output, after which it ends; known when it is queued
    stop_token_ids: frozenset[int] = frozenset()  # the request's, known when it is queued
    added_at: float = 0.0  # seconds, time.monotonic
    draft_token_ids: list[int] = field(default_factory=list)
    draft_parents: list[int] = field(default_factory=list)
    draft_confidences: list[float] = field(default_factory=list)  # the proposer's, of each after its parent, or none
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_tables: list[list[int]] = field(default_factory=list)  # of each group of layers; empty: it owns no blocks
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `token_ids`, computed or not
    num_committed_blocks: int = 0  # leading blocks that the prefix cache knows
    num_released_blocks: list[int] = field(default_factory=lambda: [0])  # leading ones of each table, behind a window
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    num_prefill_chunks: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_accepted_drafts: int = 0
    num_scored_tokens: int = 0  # prompt tokens whose log-probabilities were emitted
    pooled_sum: Doubles | None = None  # of the hidden states that its vector is made of, as far as it is computed

    def draft_run(self, token_ids: list[int], confidences: list[float]) -> None:
        """Sets drafts that follow each other, or none."""
        self.draft_token_ids, self.draft_confidences = token_ids, confidences
        self.draft_parents = list(range(-1, len(token_ids) - 1))

    def keep_drafts(self, kept: list[int]) -> None:
        """Leaves it the drafts of these indices, rising; of each of them, its parent is one."""
        if len(kept) == len(self.draft_token_ids):
            return
        places = {-1: -1} | {index: place for place, index in enumerate(kept)}
        self.draft_parents = [places[self.draft_parents[index]] for index in kept]
        self.draft_token_ids = [self.draft_token_ids[index] for index in kept]
        if self.draft_confidences:
            self.draft_confidences = [self.draft_confidences[index] for index in kept]

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def block_table(self) -> list[int]:
        """Of the first group of layers, which for most models is the only one."""
        return self.block_tables[0] if self.block_tables else []

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(slots=True)
class Scheduled:
    """One item of a step's batch: compute `num_new_tokens` tokens of a sequence from the first uncomputed one.

    A step may be scheduled while the one before it is in flight: then `num_ahead` tokens of the sequence are computed
    there, and where its newest token is sampled there, `source` is the sampled row of that step (else -1).

    The sequence's drafts are the last `num_drafts` of them. Logits are wanted for the last `num_logits` rows: first
    `num_scored` rows that only score prompt tokens (prompt log-probabilities), then, if `samples`, 1 + num_drafts
    rows that are sampled.
    """

    seq: Sequence
    num_new_tokens: int
    num_drafts: int
    samples: bool  # False for a prompt chunk that is not the last
    num_scored: int = 0
    num_ahead: int = 0
    source: int = -1

    @property
    def num_computed_tokens(self) -> int:
        """Tokens of the sequence that are in the KV cache when the step begins."""
        return self.seq.num_computed_tokens + self.num_ahead

    @property
    def next_position(self) -> int:
        """How many tokens the sequence has when this step's new ones are in: where the next one goes.

        Known to the scheduler before the tokens themselves are.
        """
        return self.seq.num_computed_tokens + self.num_ahead + self.num_new_tokens - self.num_drafts

    @property
    def num_sampled_rows(self) -> int:
        return 1 + self.num_drafts if self.samples else 0

    @property
    def num_logits(self) -> int:
        return self.num_scored + self.num_sampled_rows


@dataclass(slots=True)
class Sampled:
    """What the sampler decided for one `Scheduled`; empty for a prompt chunk that does not sample."""

    token_ids: list[int]  # accepted drafts, then the first token that is not a draft
    accepted: list[int] = field(default_factory=list)  # indices of the accepted drafts, from the root down
    logprobs: list[TokenLogprobs] | None = None  # one per token id
    prompt_logprobs: list[TokenLogprobs] | None = None  # one per scored row
    pooled: Doubles | None = None  # [hidden_size] the sum of its hidden states that are pooled
    error: str | None = None  # the request cannot go on, for example because its logits are not finite
    error_kind: ErrorKind = "request"  # of `error`
    is_over: bool = False  # the text is complete: behind these tokens, its grammar allows none
