"""An exception in any place of a step: every token is what it would have been, in this process or in the next one.

A step is watched once for the places in which its functions call others. Then one call after another raises, once, in
an engine of its own. What fails while tokens are computed is mended within the step; what fails elsewhere ends the
process, and whatever its requests have been given by then is where another goes on.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec
import pytest
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_cache.manager import KVCacheManager
from engine.sampling import triton_sampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.types import Request, SamplingParams
from kernels.reference import sampling
from tests import ROOT
from tests.support import faulty_device
from tests.support.recorded_graphs import BLOCK_SIZE, FakeGraphDevice, Setup
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST, VOCAB_SIZE

ENGINE = str(ROOT / "engine") + "/"
COMPUTES = Engine._compute.__code__
Site = tuple[str, int, str]  # file, line, "call" or "c_call"


class InjectedError(Exception):
    """Raised by the test in the middle of a step."""


@dataclass
class Injector:
    """Counts the calls in the engine's functions by their sites, and raises once, at the so-manieth of a site."""

    site: Site | None = None
    number: int = 1
    num_calls: Counter[Site] = field(default_factory=Counter)
    raised_at: str = ""
    was_computing: bool = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        sys.setprofile(None if self.raised_at else self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_call") or not code.co_filename.startswith(ENGINE):
            return
        site = code.co_filename.removeprefix(ENGINE), frame.f_lineno, event
        self.num_calls[site] += 1
        if site == self.site and self.num_calls[site] == self.number:
            sys.setprofile(None)
            self.raised_at = f"{code.co_qualname}, {event} {self.number} of line {frame.f_lineno}"
            caller = frame.f_back if event == "call" else frame
            self.was_computing = any(one.f_code is COMPUTES for one in _callers(caller))
            raise InjectedError(self.raised_at)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def make_torch(*, has_drafts: bool = False, overlap: bool = False) -> Engine:
    proposer = NgramProposer(num_drafts=3, ngram_min=1, ngram_max=2) if has_drafts else None
    return faulty_device.make_engine(overlap=overlap, proposer=proposer, num_blocks=60)


def make_numba(folder: Path) -> Engine:
    """Compiled layers, int8 products, a compiled sampler."""
    sections = {
        "model": {"path": str(folder), "load_format": "dummy", "quantization": "int8"},
        "device": {"name": "cpu", "kernels": "numba", "num_threads": 1},
        "kv_cache": {"memory": "640tokens"},
        "speculation": {"method": "ngram", "depth": 3, "ngram_min": 1},
    }
    return build_engine(EngineConfig.model_validate(sections), lambda phase, detail: None)[0]


def make_graphs() -> Engine:
    """Steps that are launched ahead and replayed, and a GPU's sampler."""
    setup = Setup("full", FakeGraphDevice())
    limits = SchedulerLimits(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=70, headroom=1)
    scheduler = Scheduler(KVCacheManager(60, BLOCK_SIZE), limits)
    sampler = triton_sampler.TritonSampler(VOCAB_SIZE)
    return engine_of(setup.runner, scheduler, sampler, NoProposer(), COST, overlap=True)


def make_requests(*, max_tokens: int = 8) -> list[Request]:
    """Of every kind that has a state of its own in a step: penalties, words, scores, repetition for n-grams."""
    rng = random.Random(5)
    kinds: list[dict[str, object]] = [
        {},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "max_tokens": max_tokens // 2},
        {"presence_penalty": 1.0, "bad_words": [[3, 4], [5]], "allowed_token_ids": list(range(20))},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"top_k": 7, "top_p": 0.9, "logit_bias": {1: 2.0}, "min_tokens": 3, "stop_token_ids": [6]},
    ]
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=[rng.randrange(8) for _ in range(3 + 6 * i)],
            params=SamplingParams(**{"seed": i, "max_tokens": max_tokens, "temperature": 0.9, **kind}),
        )
        for i, kind in enumerate(kinds)
    ]


def run(make_engine: Callable[[], Engine], injector: Injector) -> dict[str, list[int]]:
    """The tokens of all requests, the last of which come while the others run. Nothing may be left of them."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in make_requests()}
    waiting = {request.request_id: request for request in make_requests()}  # given to no process yet, or to a dead one
    unfinished = dict(waiting)
    engine = make_engine()
    num_at_once = 3
    while waiting or engine.has_work:
        for name in list(waiting)[:num_at_once]:
            engine.add(msgspec.structs.replace(waiting.pop(name), output_token_ids=list(tokens[name])))
        num_at_once = 1
        try:
            with injector.watching():
                outputs, _, _ = engine.step()
        except InjectedError:
            assert not injector.was_computing, f"{injector.raised_at} ended the process"
            engine = make_engine()
            waiting = dict(unfinished)
            continue
        for output in outputs:
            assert output.error is None, f"{injector.raised_at}: {output.error}"
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                del unfinished[output.request_id]
    assert engine.scheduler.kv.pool.num_owned == 0, injector.raised_at
    assert not unfinished
    return tokens


@pytest.fixture(autouse=True)
def kernels_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter would take a second for each step."""
    for name in ("sample_tokens", "penalise", "score_tokens"):
        monkeypatch.setattr(triton_sampler, name, getattr(sampling, name))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Engine]]:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, architectures=["LlamaForCausalLM"],
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ).save_pretrained(folder)  # fmt: skip
    return {
        "plain": make_torch,
        "drafts": lambda: make_torch(has_drafts=True),
        "overlap": lambda: make_torch(overlap=True),
        "compiled": lambda: make_numba(folder),
        "graphs": make_graphs,
    }


KINDS = ("plain", "drafts", "overlap", "compiled", "graphs")


def check(make_engine: Callable[[], Engine], site: Site, number: int, expected: dict[str, list[int]]) -> None:
    injector = Injector(site, number)
    found = run(make_engine, injector)
    assert injector.raised_at, site
    assert found == expected, injector.raised_at


def watch(make_engine: Callable[[], Engine]) -> tuple[Counter[Site], dict[str, list[int]]]:
    """(the number of calls by site, the tokens) where nothing fails"""
    run(make_engine, Injector())  # what is made once in a process is made by this one
    watched = Injector()
    expected = run(make_engine, watched)
    assert len(watched.num_calls) > 200
    return watched.num_calls, expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_any_place_of_a_step_changes_no_token(kind: str, engines) -> None:
    """In one place of each file, at random; `-m slow` tries them all."""
    rng = random.Random(kind)
    num_calls, expected = watch(engines[kind])
    by_file: dict[str, list[Site]] = defaultdict(list)
    for site in sorted(num_calls):
        by_file[site[0]].append(site)
    assert len(by_file) > 20
    for sites in by_file.values():
        site = rng.choice(sites)
        check(engines[kind], site, rng.randint(1, num_calls[site]), expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_every_place_of_a_step_changes_no_token(kind: str, engines) -> None:
    """At the first call of each, and at the last one."""
    num_calls, expected = watch(engines[kind])
    for site in sorted(num_calls):
        for number in {1, num_calls[site]}:
            check(engines[kind], site, number, expected)
