"""An honest step is never held to be hung, whatever the machine and the model; a real hang is, after a bounded time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec
import pytest

from engine.ipc.messages import ModelInfo, TokenizerAssets
from engine.scheduling.step_patience import CEILING_FACTOR, MEASURED_FACTOR, StepPatience, StepSize, size_of
from engine.types import Request, SamplingParams, Scheduled, Sequence

MODEL = ModelInfo(
    path="",
    architecture="",
    num_parameters=7_000_000_000,
    vocab_size=1,
    trained_context=1,
    max_model_len=1,
    num_kv_tokens=1,
    eos_token_ids=[],
    generation_defaults={},
    tokenizer=TokenizerAssets(tokenizer_json="", chat_template=None, special_tokens={}),
    fingerprint="",
    settings={},
    phase_seconds={},
    bytes_per_second=1e10,
    flops_per_second=1e11,
)


def make_item(num_computed: int, num_new: int) -> Scheduled:
    request = Request(request_id="r", prompt_token_ids=[], params=SamplingParams(seed=0, max_tokens=1))
    return Scheduled(Sequence(request, [], num_computed_tokens=num_computed), num_new, 0, samples=True)


@dataclass
class Machine:
    """Steps take a time of their own, some for each token, and some for each pair of one with another."""

    per_step: float
    per_token: float
    per_pair: float

    def seconds(self, batch: list[Scheduled], chance: random.Random) -> float:
        seconds = self.per_step
        for item in batch:
            pairs = item.num_new_tokens * (item.seq.num_computed_tokens + item.num_new_tokens / 2)
            seconds += item.num_new_tokens * self.per_token + pairs * self.per_pair
        return seconds * chance.choice([1, 1, 1, chance.uniform(1, 4)])  # others have the cores now and then


def random_machine(chance: random.Random) -> Machine:
    per_token = 10 ** chance.uniform(-7, 1)
    return Machine(
        per_step=per_token * 10 ** chance.uniform(-1, 2),
        per_token=per_token,
        per_pair=per_token / 10 ** chance.uniform(3, 5),
    )


def random_batch(chance: random.Random) -> list[Scheduled]:
    batch = [make_item(chance.randint(0, 2 ** chance.randint(1, 17)), 1) for _ in range(chance.choice([0, 1, 8, 64]))]
    if not batch or chance.random() < 0.4:
        batch.append(make_item(chance.randint(0, 2 ** chance.randint(1, 17)), 2 ** chance.randint(0, 13)))
    return batch


@pytest.mark.parametrize("seed", range(30))
def test_a_step_that_is_as_slow_as_the_machine_is_never_a_hang(seed: int) -> None:
    chance = random.Random(seed)
    machine, patience = random_machine(chance), StepPatience(MODEL)
    for number in range(300):
        batch = random_batch(chance)
        seconds = machine.seconds(batch, chance)
        if number:  # the first one is measured by what the machine can do at best
            assert seconds <= patience.limit(size_of(batch))
        patience.learn(size_of(batch), seconds)


@pytest.mark.parametrize("seed", range(10))
def test_a_hang_is_found_after_some_dozen_times_what_such_a_step_takes(seed: int) -> None:
    chance = random.Random(seed)
    machine, patience = random_machine(chance), StepPatience(MODEL)
    batches = [random_batch(chance) for _ in range(50)]
    for batch in batches * 20:
        patience.learn(size_of(batch), machine.seconds(batch, chance))
    for batch in batches:
        honest = machine.seconds(batch, random.Random(0))
        heaviest_of_its_size = (
            2 * 4 * 100
        )  # twice the weight, four times by others, and pairs for which too much is allowed
        assert patience.limit(size_of(batch)) <= MEASURED_FACTOR * heaviest_of_its_size * honest


def test_before_any_step_what_the_machine_can_do_at_best_is_the_measure() -> None:
    patience = StepPatience(MODEL)
    prompt = [make_item(0, 2048)]
    at_best = 2 * 7e9 * 2048 / 1e11  # 287 s, which are no hang
    assert CEILING_FACTOR * at_best <= patience.limit(size_of(prompt)) <= 4 * CEILING_FACTOR * at_best
    unmeasured = msgspec.structs.replace(MODEL, bytes_per_second=0.0, flops_per_second=0.0)
    assert StepPatience(unmeasured).limit(size_of(prompt)) == 0.0


def test_one_slow_step_is_forgotten() -> None:
    patience = StepPatience(MODEL)
    patience.learn(StepSize(5, 50), 0.01)
    patience.learn(StepSize(5, 50), 100.0)  # the machine was asleep
    assert patience.limit(StepSize(5, 50)) > 100
    for _ in range(200):
        patience.learn(StepSize(5, 50), 0.01)
    assert patience.limit(StepSize(5, 50)) < 1
