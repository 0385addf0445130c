"""Scheduler and KV manager together, against a model of what the KV cache holds. No tensors."""

import random
from collections import Counter
from dataclasses import dataclass, field

from engine.kv_cache.block_pool import NULL_BLOCK
from engine.kv_cache.manager import KVCacheManager
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence, StepOutput

VOCAB_SIZE = 5  # few tokens, so that prompts share prefixes and drafts come true


@dataclass
class World:
    """A scheduler whose 'model' is a hash, and a KV cache that remembers for which prefix each slot was written."""

    scheduler: Scheduler
    rng: random.Random
    with_drafts: bool = True
    slots: dict[int, int] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    finished: Counter[str] = field(default_factory=Counter)
    num_scored: Counter[str] = field(default_factory=Counter)
    last_batch: list[Scheduled] = field(default_factory=list)

    @property
    def kv(self) -> KVCacheManager:
        return self.scheduler.kv

    def add(self, request: Request) -> Sequence:
        seq = Sequence(request, request.prompt_token_ids + request.output_token_ids)
        self.scheduler.add(seq)
        self.outputs[request.request_id] = list(request.output_token_ids)
        return seq

    def step(self) -> list[StepOutput]:
        batch = self.last_batch = self.scheduler.schedule()
        sampled = [self._run(item) for item in batch]
        outputs = self.scheduler.update(batch, sampled)
        for output in outputs:
            self.outputs[output.request_id] += output.token_ids
            self.num_scored[output.request_id] += len(output.prompt_logprobs or [])
            self.finished[output.request_id] += output.finish_reason is not None
        for item in batch:
            if item.samples and not item.seq.finish_reason and self.with_drafts:
                self._draft(item.seq)
        return outputs

    def run(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_work:
                return
            self.step()
            self.check()
        raise AssertionError("the scheduler does not finish")

    def check(self) -> None:
        """What must hold after every step."""
        pool, running = self.kv.pool, self.scheduler.running
        owners = Counter(
            block for seq in running for table in seq.block_tables for block in table if block != NULL_BLOCK
        )
        assert all(count == owners[block] for block, count in enumerate(pool.ref_counts))
        assert len(owners) == pool.num_owned
        assert set(owners).isdisjoint(pool.free_blocks)
        assert len(owners) + pool.num_free == pool.num_blocks
        assert pool.num_cached_free == sum(block in pool.hash_of for block in pool.free_blocks)
        assert {block: h for h, block in pool.block_of.items()} == pool.hash_of
        for seq in running:
            assert len({len(table) for table in seq.block_tables}) == 1
            self._check_contents(seq)
        limits = self.scheduler.limits
        assert len(running) <= limits.max_num_seqs
        assert sum(item.num_new_tokens for item in self.last_batch) <= limits.max_num_batched_tokens
        assert sum(item.num_logits for item in self.last_batch) <= limits.num_logits_rows
        assert len({id(item.seq) for item in self.last_batch}) == len(self.last_batch)

    def _check_contents(self, seq: Sequence) -> None:
        for table, num_released in zip(seq.block_tables, seq.num_released_blocks, strict=True):
            for position in range(num_released * self.kv.block_size, seq.num_computed_tokens):
                assert self.slots[self._slot(table, position)] == digest(seq.token_ids[: position + 1])

    def _slot(self, table: list[int], position: int) -> int:
        block = table[position // self.kv.block_size]
        assert block != NULL_BLOCK
        return block * self.kv.block_size + position % self.kv.block_size

    def _run(self, item: Scheduled) -> Sampled:
        seq = item.seq
        assert item.num_new_tokens > 0
        tokens = seq.token_ids + seq.draft_token_ids[: item.num_drafts]
        end = seq.num_computed_tokens + item.num_new_tokens
        assert end <= len(tokens)
        for position in range(seq.num_computed_tokens, end):
            for table in seq.block_tables:
                self.slots[self._slot(table, position)] = digest(tokens[: position + 1])
        scores = [None] * item.num_scored if item.num_scored else None
        if not item.samples:
            return Sampled([], prompt_logprobs=scores)
        assert end == len(tokens)
        emitted = [next_token(tokens[: seq.num_tokens])]
        while len(emitted) <= item.num_drafts and emitted[-1] == seq.draft_token_ids[len(emitted) - 1]:
            emitted.append(next_token(tokens[: seq.num_tokens + len(emitted)]))
        return Sampled(emitted, list(range(len(emitted) - 1)), prompt_logprobs=scores)

    def _draft(self, seq: Sequence) -> None:
        guess = list(seq.token_ids)
        for _ in range(self.rng.randrange(4)):
            is_right = self.rng.random() < 0.7
            guess.append(next_token(guess) if is_right else self.rng.randrange(VOCAB_SIZE))
        seq.draft_token_ids = guess[seq.num_tokens :]
        seq.draft_parents = list(range(-1, len(seq.draft_token_ids) - 1))


def digest(token_ids: list[int]) -> int:
    return hash(tuple(token_ids))


def next_token(token_ids: list[int]) -> int:
    return digest(token_ids) % VOCAB_SIZE


def reference_output(request: Request, max_model_len: int) -> list[int]:
    ids, params = list(request.prompt_token_ids), request.params
    while True:
        ids.append(next_token(ids))
        output = ids[len(request.prompt_token_ids) :]
        is_stop = ids[-1] in params.stop_token_ids and len(output) > params.min_tokens
        if is_stop or len(output) >= params.max_tokens or len(ids) >= max_model_len:
            return output


def random_request(rng: random.Random, request_id: str, max_prompt: int, tenants: tuple[str, ...] = ("",)) -> Request:
    shared = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 2, 2][: rng.randrange(13)]
    prompt = shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, max_prompt - 12))]
    params = SamplingParams(
        seed=0,
        max_tokens=rng.randrange(1, 30),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=[rng.randrange(VOCAB_SIZE)] if rng.random() < 0.2 else [],
        prompt_logprobs=0 if rng.random() < 0.1 else None,
    )
    salt = rng.choice(["", "", "other tenant"])
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        priority=rng.choice([0, 0, 1]),
        tenant=rng.choice(tenants),
        cache_salt=salt,
    )


def plain_request(request_id: str, prompt: list[int], max_tokens: int, **fields: float | str) -> Request:
    params = SamplingParams(seed=0, max_tokens=max_tokens)
    return Request(request_id=request_id, prompt_token_ids=prompt, params=params, **fields)


def make_world(
    *,
    num_blocks: int = 33,
    block_size: int = 4,
    budget: int = 16,
    max_num_seqs: int = 8,
    max_model_len: int = 64,
    max_num_logits: int | None = None,
    min_prompt_share: int | None = None,
    seed: int = 0,
    **options: bool | list[int | None],
) -> World:
    kv = KVCacheManager(num_blocks, block_size, **options)
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        max_num_logits=max_num_logits,
        min_prompt_share=min_prompt_share,
        headroom=8,
    )
    return World(Scheduler(kv, limits), random.Random(seed))
