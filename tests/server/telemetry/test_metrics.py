"""Metrics: valid, complete, cheap, and exact."""

import random
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import KVCacheConfig
from engine.ipc.messages import ModelInfo, Setting, TokenizerAssets
from engine.types import DRAFT_OUTCOMES, RequestTiming, StepStats
from server.offline.batch_metrics import BatchCollector
from server.telemetry.console import StepWindow
from server.telemetry.metric_families import (
    FAMILIES,
    FINE_SECONDS,
    FINE_SHORT_SECONDS,
    TOKENS,
    docs_page,
    docs_table,
)
from server.telemetry.metrics import ENDS, OUTCOMES, EngineCollector, Metrics
from server.telemetry.request_record import TokenCounts
from server.telemetry.step_metrics import PHASES, Roofline
from tests import ROOT

VLLM_HISTOGRAMS = [
    "e2e_request_latency_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_inference_time_seconds",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
]
VLLM_COUNTERS = [
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
]
VLLM_GAUGES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
]


class Engine:
    state, model = "ready", None
    num_running, num_waiting, num_waiting_tokens, num_restarts = 3, 2, 40, 1


def step(**changes: object) -> StepStats:
    values: dict[str, object] = {
        "num_tokens": 8, "num_seqs": 4, "num_running": 4, "num_waiting": 0, "schedule": 0.0001, "forward": 0.02,
        "sample": 0.001, "update": 0.0001, "propose": 0.0002, "num_blocks": 100, "num_owned_blocks": 40,
        "num_cached_blocks": 10, "num_preemptions": 0, "num_prefix_queries": 0, "num_prefix_hits": 0, "num_drafts": 0,
        "num_draft_tokens": 0, "accepted_by_position": [], "bytes_moved": 1000, "flops": 2000,
    }  # fmt: skip
    return StepStats(**{**values, **changes})


def model(**changes: object) -> ModelInfo:
    values: dict[str, object] = {
        "path": "p", "architecture": "a", "num_parameters": 1, "vocab_size": 9, "trained_context": 8,
        "max_model_len": 8, "num_kv_tokens": 8, "num_kv_blocks": 2, "eos_token_ids": [], "generation_defaults": {},
        "fingerprint": "fp", "settings": {"kv_cache.dtype": Setting("float16", "model")},
        "tokenizer": TokenizerAssets(tokenizer_json="{}", chat_template=None, special_tokens={}),
        "phase_seconds": {"weights": 1.5, "measure": 0.1},
        "bytes_per_second": 100_000.0, "flops_per_second": 1_000_000.0,
    }  # fmt: skip
    return ModelInfo(**{**values, **changes})


def make(*, vllm_names: bool = False) -> Metrics:
    metrics = Metrics("tiny", proposer="ngram", kv_cache=KVCacheConfig(block_size=4), vllm_names=vllm_names)
    metrics.registry.register(EngineCollector(Engine(), "tiny", is_ready=lambda: True))
    metrics.registry.register(BatchCollector(None, "tiny"))
    return metrics


def exercise(metrics: Metrics) -> None:
    """Something of everything."""
    metrics.on_ready(model())
    metrics.on_step(step(num_preemptions=1, num_prefix_queries=9, num_prefix_hits=4))
    metrics.on_step(step(num_drafts=2, num_draft_tokens=8, accepted_by_position=[2, 1], num_output_tokens=5))
    metrics.request_arrived()
    metrics.request_started(3, 64)
    metrics.first_token(0.1)
    metrics.tokens_delivered(1, None)
    metrics.tokens_delivered(2, 0.02)
    metrics.request_finished("stop", 200, TokenCounts(num_prompt_tokens=5, num_output_tokens=3), 0.2, timing())
    metrics.on_death("killed")
    metrics.on_replay(2)


def timing() -> RequestTiming:
    return RequestTiming(
        queued=0.01,
        prefill=0.09,
        decode=0.1,
        num_prefill_chunks=1,
        num_preemptions=0,
        num_drafts=0,
        num_accepted_drafts=0,
    )


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of the samples with that name and those labels."""
    hits = [v for (n, pairs), v in samples(metrics).items() if n == name and labels.items() <= dict(pairs).items()]
    assert hits, f"there is no {name} with {labels}"
    return sum(hits)


def test_every_family_of_the_table_is_there_with_its_kind_and_labels():
    metrics = make()
    exercise(metrics)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    for family in FAMILIES:
        found = families.pop(family.full_name.removesuffix("_total"))
        assert (found.type, found.documentation) == (family.kind, family.help)
        assert found.samples, family.name
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == {"model_name", *family.labels}
            assert sample.labels["model_name"] == "tiny"
    assert all(name.startswith("process_") for name in families), "a family is missing in the table"


def test_names_follow_the_conventions():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert bool(family.buckets) == (family.kind == "histogram"), family.name
        assert list(family.buckets) == sorted(set(family.buckets))
        assert not any(unit in family.name for unit in ("milli", "_ms", "percent", "kilobytes", "minutes"))
        assert family.help.endswith(".")
        if family.name.endswith("seconds") and family.kind == "histogram":
            assert family.buckets[0] == (0.0001 if family.buckets[-1] == 10 else 0.001)


def test_series_exist_before_the_first_request():
    fresh = make()
    for outcome, status in ENDS:
        assert value(fresh, "peregrine_requests_total", outcome=outcome, status=str(status)) == 0
    for phase in PHASES:
        assert value(fresh, "peregrine_step_seconds_count", phase=phase) == 0
    assert value(fresh, "peregrine_drafts_total") == 0
    assert value(fresh, "peregrine_accepted_draft_tokens_total", position="0") == 0
    for proposer in ("none", "ngram"):
        fresh = Metrics("tiny", proposer=proposer)
        for outcome in DRAFT_OUTCOMES:
            assert value(fresh, "peregrine_drafted_steps_total", proposer=proposer, outcome=outcome) == 0
        fresh.on_ready(model(num_drafts=3))
        for position in range(3):
            assert value(fresh, "peregrine_accepted_draft_tokens_total", position=str(position)) == 0


def test_every_family_has_its_series_before_the_first_request():
    """A rate begins at the second sample of a series: what appears with the first error hides it."""
    fresh = make()
    fresh.on_ready(model())
    shown = {name for name, _ in samples(fresh)}
    for family in FAMILIES:
        assert {family.full_name, f"{family.full_name}_count"} & shown, family.name


def test_the_blocks_are_there_before_the_first_step_and_after_a_restart():
    metrics = make()
    assert value(metrics, "peregrine_kv_blocks") == 0, "no engine has any"
    for _ in range(2):
        metrics.on_ready(model(num_kv_blocks=100))
        assert [value(metrics, "peregrine_kv_blocks", state=s) for s in ("owned", "cached", "free")] == [0, 0, 100]
        assert value(metrics, "peregrine_kv_cache_config_info", num_blocks="100") == 1
        metrics.on_step(step(num_owned_blocks=40))
        metrics.on_death("killed")
        assert value(metrics, "peregrine_kv_blocks") == 0


def test_a_restart_lowers_no_ceiling():
    metrics = make()
    metrics.on_ready(model(bytes_per_second=100.0, flops_per_second=100.0))
    metrics.on_step(step(forward=1.0, bytes_moved=5000, flops=7000))
    metrics.on_ready(model(bytes_per_second=100.0, flops_per_second=100.0))
    assert value(metrics, "peregrine_ceiling_bytes_per_second") == 5000
    assert value(metrics, "peregrine_ceiling_flops_per_second") == 7000
    assert value(metrics, "peregrine_roofline_ratio") == 1.0


def test_refusals_for_want_of_room_and_of_a_server_are_told_apart():
    metrics = make()
    for status in (429, 429, 503):
        metrics.request_rejected("rejected", status)
    assert value(metrics, "peregrine_requests_total", outcome="rejected", status="429") == 2
    assert value(metrics, "peregrine_requests_total", outcome="rejected", status="503") == 1


def median(bounds: tuple[float, ...], observed: float) -> float:
    """What Prometheus makes of a histogram in which all values are this one."""
    above = next(bound for bound in bounds if observed <= bound)
    below = max((bound for bound in bounds if bound < above), default=0.0)
    return (below + above) / 2


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.buckets], ids=lambda family: family.name)
def test_buckets_resolve(family):
    """24 tokens must not look like 35, nor 20 ms like 30."""
    tolerance = {TOKENS: 1 / 8, FINE_SECONDS: 1 / 6, FINE_SHORT_SECONDS: 1 / 6}.get(family.buckets, 1 / 3)
    generator = random.Random(1)
    low, high = family.buckets[0], family.buckets[-1]
    for _ in range(500):
        observed = low * (high / low) ** generator.random()
        if low == 1:  # these count
            observed = max(round(observed), 2)
        assert median(family.buckets, observed) == pytest.approx(observed, rel=tolerance, abs=0.5 if low == 1 else 0)


def test_all_families_together_stay_small():
    """A scrape is written in the event loop, where streams wait for it."""
    assert make(vllm_names=True).render().count(b"\n") < 3000


def test_vllm_s_names_are_there_only_if_asked_for():
    assert "vllm:" not in make().render().decode()
    metrics = make(vllm_names=True)
    exercise(metrics)
    families = {f.name: f.type for f in text_string_to_metric_families(metrics.render().decode())}
    kinds = {"histogram": VLLM_HISTOGRAMS, "counter": VLLM_COUNTERS, "gauge": VLLM_GAUGES}
    for kind, names in kinds.items():
        for name in names:
            shown = name.removesuffix("_total") if kind == "counter" else name
            assert families.pop(f"vllm:{shown}") == kind
    assert not [name for name in families if name.startswith("vllm:")]


def test_vllm_s_numbers_are_ours():
    metrics = make(vllm_names=True)
    exercise(metrics)
    for outcome in ("length", "timeout", "invalid"):
        metrics.request_rejected(outcome, 400)
    for ours, theirs in [
        ("peregrine_generation_tokens_total", "vllm:generation_tokens_total"),
        ("peregrine_time_to_first_token_seconds_sum", "vllm:time_to_first_token_seconds_sum"),
        ("peregrine_inter_token_latency_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
        ("peregrine_step_progress_tokens_sum", "vllm:iteration_tokens_total_sum"),
        ("peregrine_request_inference_seconds_sum", "vllm:request_inference_time_seconds_sum"),
        ("peregrine_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
        ("peregrine_requests_running", "vllm:num_requests_running"),
    ]:
        assert value(metrics, ours) == value(metrics, theirs)
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 3
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="1") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total") == 2  # a timeout is no success
    assert value(metrics, "vllm:num_requests_waiting_by_reason", reason="capacity") == 2
    assert value(metrics, "vllm:num_requests_waiting_by_reason", reason="deferred") == 0
    assert value(metrics, "vllm:request_params_n_sum") == 3
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 64
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == pytest.approx(0.19)
    described = {"block_size": "4", "num_gpu_blocks": "2", "cache_dtype": "float16", "enable_prefix_caching": "True"}
    assert value(metrics, "vllm:cache_config_info", kv_cache_size_tokens="8", **described) == 1


def test_vllm_s_iteration_tokens_are_those_that_requests_got_and_the_prompts_behind_a_first_one():
    """A step of prompt chunks gave nobody anything, and rejected drafts were given to nobody."""
    metrics = make(vllm_names=True)
    metrics.on_step(step(num_tokens=512))
    metrics.on_step(step(num_tokens=189, num_output_tokens=5, num_first_prompt_tokens=700))
    metrics.on_step(step(num_tokens=12, num_output_tokens=7))
    name = "vllm:iteration_tokens_total"
    assert value(metrics, f"{name}_count") == 2
    assert value(metrics, f"{name}_sum") == 712
    assert value(metrics, f"{name}_bucket", le="8.0") == 1


def test_random_requests_add_up():
    generator = random.Random(3)
    metrics, num_arrived, num_tokens, num_prompt, num_gaps = make(), 0, 0, 0, 0
    for _ in range(300):
        metrics.request_arrived()
        num_arrived += 1
        outcome = generator.choice(OUTCOMES)
        if outcome in ("rejected", "invalid"):
            metrics.request_rejected(outcome, generator.choice([400, 429, 503]))
            continue
        outputs = [generator.randint(1, 5) for _ in range(generator.randint(1, 6))]
        for index, count in enumerate(outputs):
            metrics.tokens_delivered(count, 0.01 if index else None)
            num_gaps += count if index else 0
        prompt = generator.randint(1, 1000)
        counts = TokenCounts(num_prompt_tokens=prompt, num_cached_tokens=prompt // 2, num_output_tokens=sum(outputs))
        metrics.request_finished(outcome, 200, counts, 0.5, None)
        num_tokens, num_prompt = num_tokens + sum(outputs), num_prompt + prompt
    assert value(metrics, "peregrine_requests_received_total") == num_arrived
    assert value(metrics, "peregrine_requests_total") == num_arrived
    assert value(metrics, "peregrine_generation_tokens_total") == num_tokens
    assert value(metrics, "peregrine_request_generation_tokens_sum") == num_tokens
    assert value(metrics, "peregrine_prompt_tokens_total") == num_prompt
    assert value(metrics, "peregrine_inter_token_latency_seconds_count") == num_gaps


def test_tokens_that_come_together_share_the_time():
    metrics = make()
    metrics.tokens_delivered(4, 0.02)
    assert value(metrics, "peregrine_inter_token_latency_seconds_count") == 4
    assert value(metrics, "peregrine_inter_token_latency_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "peregrine_inter_token_latency_seconds_bucket", le="0.005") == 4


def test_random_steps_add_up():
    generator = random.Random(5)
    metrics, steps = make(), []
    for _ in range(200):
        accepted = [generator.randint(0, 3) for _ in range(generator.randint(0, 5))]
        steps.append(
            step(
                num_tokens=generator.randint(1, 600), num_seqs=generator.randint(1, 40), forward=generator.random(),
                num_drafts=3, num_draft_tokens=sum(accepted) + 2, accepted_by_position=accepted,
                num_preemptions=generator.randint(0, 2), bytes_moved=generator.randint(0, 10**9),
            )
        )  # fmt: skip
        metrics.on_step(steps[-1])
    assert value(metrics, "peregrine_step_tokens_sum") == sum(s.num_tokens for s in steps)
    assert value(metrics, "peregrine_step_tokens_bucket", le="+Inf") == 200
    for bound in (1, 64, 512):
        expected = sum(s.num_tokens <= bound for s in steps)
        assert value(metrics, "peregrine_step_tokens_bucket", le=f"{bound}.0") == expected
    assert value(metrics, "peregrine_step_seconds_sum", phase="forward") == pytest.approx(sum(s.forward for s in steps))
    assert value(metrics, "peregrine_model_bytes_total") == sum(s.bytes_moved for s in steps)
    assert value(metrics, "peregrine_preemptions_total") == sum(s.num_preemptions for s in steps)
    assert value(metrics, "peregrine_draft_tokens_total", proposer="ngram") == sum(s.num_draft_tokens for s in steps)
    for position in range(5):
        expected = sum(s.accepted_by_position[position] for s in steps if len(s.accepted_by_position) > position)
        assert value(metrics, "peregrine_accepted_draft_tokens_total", position=str(position)) == expected


def test_steps_with_a_target_tell_their_chunks_what_ended_them_and_how_well_their_time_was_foretold():
    metrics = make()
    metrics.on_step(step())  # without a target nothing of it is counted
    assert value(metrics, "peregrine_paced_steps_total") == value(metrics, "peregrine_step_time_ratio_count") == 0
    paced = step(prompt_limit="target", num_prompt_tokens=12, num_tokens=20)
    metrics.on_step(step(predicted=paced.seconds / 1.12, prompt_limit="target", num_prompt_tokens=12, num_tokens=20))
    metrics.on_step(step(predicted=paced.seconds, prompt_limit="least", num_prompt_tokens=4, num_tokens=20))
    metrics.on_step(step(predicted=paced.seconds))  # no prompts
    assert value(metrics, "peregrine_paced_steps_total", limit="target") == 1
    assert value(metrics, "peregrine_paced_steps_total", limit="least") == 1
    assert value(metrics, "peregrine_paced_steps_total", limit="none") == 0
    assert value(metrics, "peregrine_paced_prompt_tokens_sum") == 16
    assert value(metrics, "peregrine_step_time_ratio_count") == 3
    assert value(metrics, "peregrine_step_time_ratio_bucket", le="1.1") == 2
    assert value(metrics, "peregrine_step_time_ratio_bucket", le="1.25") == 3


def test_blocks_are_those_of_the_latest_step_and_gone_with_the_process():
    metrics = make()
    metrics.on_step(step(num_blocks=100, num_owned_blocks=40, num_cached_blocks=10))
    assert [value(metrics, "peregrine_kv_blocks", state=s) for s in ("owned", "cached", "free")] == [40, 10, 50]
    assert value(metrics, "peregrine_kv_cache_usage_ratio") == 0.4
    metrics.on_death("killed")
    assert value(metrics, "peregrine_kv_blocks") == value(metrics, "peregrine_kv_cache_usage_ratio") == 0


def test_restarts_replays_and_phases_of_the_start_are_shown():
    metrics = make()
    exercise(metrics)
    assert value(metrics, "peregrine_engine_deaths_total") == 1
    assert value(metrics, "peregrine_engine_restarts_total") == 1
    assert value(metrics, "peregrine_replayed_requests_total") == 2
    assert value(metrics, "peregrine_startup_seconds", phase="weights") == 1.5
    metrics.on_ready(model(phase_seconds={"weights": 2.0}))
    assert value(metrics, "peregrine_startup_seconds") == 2.0  # the other phase belongs to a start that is over


def test_the_roofline_is_what_was_achieved_by_what_is_possible():
    metrics = make()
    metrics.on_ready(model(bytes_per_second=100_000.0, flops_per_second=1_000_000.0))
    for _ in range(50):
        metrics.on_step(step(forward=0.02, bytes_moved=1000, flops=2000))
    assert value(metrics, "peregrine_achieved_bytes_per_second") == pytest.approx(50_000)
    assert value(metrics, "peregrine_achieved_flops_per_second") == pytest.approx(100_000)
    assert value(metrics, "peregrine_roofline_ratio") == pytest.approx(0.5)  # memory binds


def test_no_ceiling_is_below_what_is_achieved():
    """One that was measured while the machine was busy is raised by the first steps."""
    rng = random.Random(0)
    for _ in range(50):
        metrics = make()
        ceilings = {"bytes_per_second": 10 ** rng.uniform(0, 12), "flops_per_second": 10 ** rng.uniform(0, 12)}
        metrics.on_ready(model(**ceilings))
        for _ in range(30):
            work = {"bytes_moved": rng.randrange(10**6), "flops": rng.choice([0, rng.randrange(10**9)])}
            metrics.on_step(step(forward=rng.choice([0.0, rng.random()]), **work))
            assert 0.0 <= metrics.steps.roofline.ratio <= 1.0
        assert value(metrics, "peregrine_roofline_ratio") == metrics.steps.roofline.ratio
        for kind, measured in ceilings.items():
            assert value(metrics, f"peregrine_ceiling_{kind}") >= measured
            assert value(metrics, f"peregrine_ceiling_{kind}") >= value(metrics, f"peregrine_achieved_{kind}")


def test_a_device_that_works_on_its_own_is_timed_until_its_tokens_are_known():
    roofline = Roofline()
    roofline.count(step(forward=0.01, sample=0.09, bytes_moved=1000, flops=1000, is_queued=True))
    assert roofline.bytes_per_second == pytest.approx(10_000)


def test_the_roofline_forgets():
    roofline = Roofline()
    roofline.count(step(forward=1.0, bytes_moved=10**9))
    for _ in range(100):
        roofline.count(step(forward=1.0, bytes_moved=10**6))
    assert roofline.bytes_per_second == pytest.approx(10**6, rel=0.01)
    assert Roofline().ratio == Roofline().bytes_per_second == 0.0


def test_a_step_costs_microseconds():
    metrics, stats = make(vllm_names=True), step(num_drafts=2, num_draft_tokens=8, accepted_by_position=[2, 1, 1])
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            metrics.on_step(stats)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 100e-6  # 8 us on an idle core; the bound is for a busy one


def test_the_docs_are_what_the_registry_says():
    path = ROOT / "docs" / "metrics.md"
    assert path.read_text() == docs_page(), "run: python -m server.telemetry.metric_families > docs/metrics.md"


def test_the_docs_table_has_a_row_for_every_family():
    table = docs_table()
    assert table.count("\n") == len(FAMILIES) + 2
    assert all(f"`{family.full_name}`" in table for family in FAMILIES)
    assert "`vllm:num_requests_waiting`" in table


def test_the_log_has_a_line_per_second_of_work():
    window, now, lines = StepWindow(), 0.0, []
    for index in range(40):
        now += 0.1
        is_last = index == 19
        now += 100 if index == 20 else 0  # idle in between
        stats = step(num_tokens=5, forward=0.1, num_running=0 if is_last else 4)
        lines += [line] if (line := window.add(stats, now)) else []
    assert 3 <= len(lines) <= 4
    rates = [float(line.split("tokens_per_second=")[1].split()[0]) for line in lines]
    assert rates == pytest.approx([50.0] * len(rates), rel=0.15)
