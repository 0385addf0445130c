"""Who may enter the queue, and when the others should come back."""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ipc.messages import Failed
from server.config import LimitsConfig
from server.errors import ApiError
from server.generation.admission import MAX_RETRY_AFTER, MIN_FAR_RETRY_AFTER, SLACK, Admission, DrainRate
from server.generation.tenant_terms import TenantTerms
from server.telemetry.request_timeline import Ahead


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    *,
    waiting: int = 0,
    tokens: int = 0,
    requests: int = 4,
    max_tokens: int = 100,
    state: str = "ready",
    max_seconds: float | None = None,
    is_shared: bool = False,
    quota: int | None = None,
    seats: int = 0,
    running: int = 7,
):
    engine = SimpleNamespace(
        state=state, phase="weights", phase_detail="98 MB", failure=None,
        num_waiting=waiting, num_waiting_tokens=tokens, num_running=running,
        num_background_waiting=0, num_background_waiting_tokens=0,
    )  # fmt: skip
    clock = Clock()
    drain_rate = DrainRate(clock=clock)
    limits = LimitsConfig(max_queued_requests=requests, max_queued_tokens=max_tokens, max_queue_seconds=max_seconds)
    admission = Admission(
        engine,
        limits,
        drain_rate,
        is_shared=lambda: is_shared,
        terms_of=lambda _: TenantTerms(1.0, quota),
        num_seats=lambda: seats,
        clock=clock,
    )
    return SimpleNamespace(admission=admission, engine=engine, clock=clock, drain_rate=drain_rate)


def refusal(parts: SimpleNamespace, num_requests: int, num_tokens: int, tenant: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        parts.admission.admit(num_requests, num_tokens, tenant)
    return caught.value


def test_the_queue_takes_requests_up_to_its_limit_and_not_one_more():
    parts = make(waiting=3, tokens=3)
    assert parts.admission.admit(1, 1).ahead == Ahead(num_waiting=3, num_waiting_tokens=3, num_running=7)
    error = refusal(parts, 2, 2)
    assert (error.status, error.code, error.type) == (429, "queue_full", "rate_limit_error")
    assert "limits.max_queued_requests (4)" in error.message
    parts.engine.num_waiting = 4
    assert refusal(parts, 1, 1).status == 429


def test_the_queue_takes_tokens_up_to_its_limit_and_not_one_more():
    parts = make(waiting=2, tokens=60)
    parts.admission.admit(1, 40)
    error = refusal(parts, 1, 41)
    assert error.status == 429
    assert "limits.max_queued_tokens (100)" in error.message


@pytest.mark.parametrize("waiting", [0, 3])
def test_what_no_queue_could_take_is_the_clients_mistake(waiting):
    parts = make(waiting=waiting)
    error = refusal(parts, 5, 5)
    assert (error.status, error.param) == (400, "n")
    assert "5 choices" in error.message
    assert "limits.max_queued_requests" in error.message
    error = refusal(parts, 1, 101)
    assert (error.status, error.param) == (400, "prompt")
    assert "101 prompt tokens" in error.message
    assert "limits.max_queued_tokens" in error.message


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60), st.sampled_from(["stay", "hand over", "leave"]))))
def test_no_order_of_arrivals_passes_a_limit(arrivals):
    """Admitted requests count at once, and until the engine counts them or they are given up."""
    parts = make()
    places = []
    for num_requests, num_tokens, then in arrivals:
        engine, admission = parts.engine, parts.admission
        fits = admission.num_waiting + num_requests <= 4 and admission.num_waiting_tokens + num_tokens <= 100
        if not fits:
            assert refusal(parts, num_requests, num_tokens).status == 429
            continue
        place = admission.admit(num_requests, num_tokens)
        if then == "leave":
            with place:
                pass
            continue
        places.append(place)
        if then == "hand over":
            place.hand_over(num_tokens)
            engine.num_waiting += 1
            engine.num_waiting_tokens += num_tokens
        assert admission.num_waiting <= 4
        assert admission.num_waiting_tokens <= 100
    for place in places:
        place.__exit__()
    assert (parts.admission.num_waiting, parts.admission.num_waiting_tokens) == (
        parts.engine.num_waiting,
        parts.engine.num_waiting_tokens,
    )


def flood(parts: SimpleNamespace, tenant: str, num_tokens: int = 1) -> list:
    """Requests of a tenant that wait, as many as are taken."""
    places = []
    while len(places) < 1000:
        try:
            place = parts.admission.admit(1, num_tokens, tenant)
        except ApiError:
            break
        place.hand_over(num_tokens)
        parts.engine.num_waiting += 1
        parts.engine.num_waiting_tokens += num_tokens
        places.append(place)
    return places


def test_each_tenant_that_floods_the_queue_leaves_as_much_room_to_others():
    parts = make(requests=120, max_tokens=100_000, is_shared=True)
    assert [len(flood(parts, tenant)) for tenant in "abc"] == [60, 30, 15]
    error = refusal(parts, 1, 1, "a")
    assert (error.status, error.code) == (429, "share_full")
    assert error.retry_after > 0
    assert "60 requests of this API key are unfinished" in error.message
    parts.admission.admit(1, 1, "d")
    tokens = make(requests=1000, max_tokens=1200, is_shared=True)
    assert [len(flood(tokens, tenant, 10)) for tenant in "ab"] == [60, 30]


def test_a_tenant_alone_may_have_the_whole_queue():
    parts = make(requests=120, max_tokens=100_000)
    assert len(flood(parts, "only")) == 120


def test_a_tenants_share_comes_back_when_its_requests_end():
    parts = make(requests=120, max_tokens=100_000, is_shared=True)
    places = flood(parts, "a")
    for place in places[:20]:
        parts.engine.num_waiting -= 1
        parts.engine.num_waiting_tokens -= 1
        place.end()
        place.__exit__()
    assert len(flood(parts, "a")) == 20


def test_one_large_request_of_a_tenant_is_bounded_by_the_queue_alone():
    parts = make(requests=120, max_tokens=1000, is_shared=True)
    with parts.admission.admit(4, 900, "a"):
        assert refusal(parts, 1, 1, "a").code == "share_full"
        parts.admission.admit(1, 50, "b")
    parts.admission.admit(4, 900, "a")


def test_a_quota_is_of_prompts_and_answers_together_and_comes_back_with_time():
    parts = make(requests=100, max_tokens=100_000, quota=600)
    with parts.admission.admit(1, 500, "a") as place:
        parts.admission.admit(1, 50, "a").__exit__()
        place.charge_output(350)  # 900 in all
    error = refusal(parts, 1, 1, "a")
    assert (error.status, error.code) == (429, "quota_exceeded")
    assert "900 tokens of 600 per minute" in error.message
    assert error.retry_after == pytest.approx(30)
    parts.admission.admit(1, 500, "b")
    parts.clock.now += 29.9
    assert refusal(parts, 1, 1, "a").code == "quota_exceeded"
    parts.clock.now += 0.2
    parts.admission.admit(1, 90_000, "a")  # one may overdraw, and the next waits
    assert refusal(parts, 1, 1, "a").retry_after > 8_000


def test_unused_minutes_of_a_quota_are_not_saved_up():
    parts = make(requests=100, max_tokens=100_000, quota=600)
    parts.clock.now += 3600
    parts.admission.admit(1, 600, "a")
    assert refusal(parts, 1, 1, "a").code == "quota_exceeded"


def test_who_would_wait_too_long_is_told_how_long_and_when_to_come_again():
    parts = make(requests=1000, max_tokens=100_000, max_seconds=2.0)
    parts.admission.admit(1, 1)  # nobody waits in the engine: it may come in
    parts.engine.num_waiting = 20
    for _ in range(200):  # ten leave each second, while others wait
        parts.drain_rate.watch(waited=True, waits=True)
        parts.clock.now += 0.1
        parts.drain_rate.watch(waited=True, waits=True)
        parts.drain_rate.count()
    rate = parts.drain_rate.per_second()
    assert 8 < rate < 12
    parts.engine.num_waiting = 9  # of about 20 that leave within 2 s, give or take the square root of that
    parts.admission.admit(1, 1)
    parts.engine.num_waiting += 30
    error = refusal(parts, 1, 1)
    assert error.status == 429
    assert "limits.max_queue_seconds (2)" in error.message
    assert 2.0 <= error.retry_after < 10.0, "about 30 must leave before"


def test_the_wait_is_held_to_its_limit_for_all_but_one_of_a_hundred():
    """Ends that come as they like, ten per second: whoever is taken waits for those before it, and for one more."""
    parts = make(requests=1000, max_tokens=100_000, max_seconds=2.0)
    drain(parts, rate=10.0, seconds=60)
    chance = random.Random(3)
    waits: list[float] = []
    for _ in range(3000):
        parts.engine.num_waiting = chance.randrange(1, 40)
        try:
            parts.admission.admit(1, 1).__exit__()
        except ApiError:
            continue
        waits.append(sum(chance.expovariate(10.0) for _ in range(parts.engine.num_waiting + 1)))
    late = sum(wait > 2.0 for wait in waits) / len(waits)
    assert 0 < late < 0.02


def burst(parts: SimpleNamespace, count: int) -> int:
    """How many of a burst are taken, none of which has had a step yet."""
    taken = 0
    for _ in range(count):
        try:
            parts.admission.admit(1, 1).hand_over(1)
        except ApiError:
            continue
        parts.engine.num_waiting += 1
        taken += 1
    return taken


def test_requests_for_which_there_are_seats_do_not_wait_for_others_to_end():
    """As far as anybody knows, two leave in a second: for the others of the burst the wait would be too long."""
    parts = make(requests=1000, max_tokens=100_000, max_seconds=1.0, seats=64, running=0)
    assert burst(parts, 200) == 64 + 1
    parts = make(requests=1000, max_tokens=100_000, max_seconds=1.0, seats=64, running=60)
    assert burst(parts, 200) == 4 + 1


def test_a_queue_that_stays_beside_free_seats_waits_for_something_else():
    parts = make(requests=1000, max_tokens=100_000, max_seconds=1.0, seats=64, running=10)
    assert burst(parts, 20) == 20
    parts.clock.now += 2.0  # for memory, say
    assert burst(parts, 20) == 0


def test_a_tenant_does_not_wait_behind_another_s_flood():
    parts = make(requests=1000, max_tokens=100_000, max_seconds=2.0, is_shared=True, seats=8, running=8)
    drain(parts, rate=10.0, seconds=60)
    flood(parts, "a", 1)
    assert "limits.max_queue_seconds" in refusal(parts, 1, 1, "a").message
    assert len(flood(parts, "b", 1)) >= 4


def test_after_a_burst_nobody_is_promised_the_rate_of_before():
    """All that run have begun together, and last for 10 s: in the next 5 s hardly any will end."""
    parts = make(requests=4, max_tokens=1000, waiting=4, seats=8, running=8)
    with parts.admission.admit(0, 0) as place:
        for _ in range(64):
            place.end(10.0)
        drain(parts, rate=4.0, seconds=30)
    first = parts.admission.admit(0, 0)
    assert refusal(parts, 1, 1).retry_after > 10.0
    parts.clock.now += 9.0
    assert 1.0 < refusal(parts, 1, 1).retry_after < 10.0
    first.__exit__()


def test_requests_that_last_unequally_end_before_their_mean():
    parts = make(requests=4, max_tokens=1000, waiting=4, seats=8, running=8)
    with parts.admission.admit(0, 0) as place:
        for number in range(64):
            place.end(1.0 if number % 2 else 19.0)
        drain(parts, rate=4.0, seconds=30)
    parts.admission.admit(0, 0)
    assert refusal(parts, 1, 1).retry_after < 5.0


def test_a_restarting_engine_keeps_its_queue_open():
    make(state="restarting").admission.admit(1, 1)


@pytest.mark.parametrize(
    ("state", "code"), [("starting", "starting"), ("failed", "engine_down"), ("stopped", "engine_down")]
)
def test_an_engine_that_cannot_generate_is_503(state, code):
    parts = make(state=state)
    error = refusal(parts, 1, 1)
    assert (error.status, error.code) == (503, code)
    assert error.retry_after >= 1


def test_the_phase_of_the_start_is_told():
    assert "weights 98 MB" in refusal(make(state="starting"), 1, 1).message


def test_the_kind_of_a_failure_is_told_but_not_its_details():
    parts = make(state="failed")
    parts.engine.failure = Failed("memory", "/secret/path does not fit")
    message = refusal(parts, 1, 1).message
    assert "memory" in message
    assert "secret" not in message


def test_a_closed_queue_is_503_whatever_the_engine_does():
    for state in ("starting", "ready", "restarting", "failed"):
        parts = make(state=state)
        parts.admission.close()
        assert (refusal(parts, 1, 1).status, refusal(parts, 1, 1).code) == (503, "draining")


def drain(parts: SimpleNamespace, *, rate: float, seconds: float) -> None:
    """So many requests per second end, while others wait."""
    for _ in range(int(seconds * rate)):
        parts.drain_rate.watch(waited=True, waits=True)
        parts.clock.now += 1 / rate
        parts.drain_rate.watch(waited=True, waits=True)
        parts.drain_rate.count()


@pytest.mark.parametrize("rate", [0.5, 2.0, 20.0])
def test_retry_after_is_the_time_that_the_excess_takes_to_drain(rate):
    parts = make(waiting=10, requests=10, max_tokens=1000)
    drain(parts, rate=rate, seconds=120)
    assert parts.drain_rate.per_second() == pytest.approx(rate, rel=0.15)
    assert refusal(parts, 8, 8).retry_after == pytest.approx(max(SLACK * 8 / rate, 8 / 10), rel=0.15)


def test_retry_after_for_tokens_counts_the_requests_that_hold_them():
    parts = make(waiting=10, tokens=100, requests=1000)  # 10 tokens each
    drain(parts, rate=1.0, seconds=120)
    assert refusal(parts, 1, 40).retry_after == pytest.approx(4.0 * SLACK, rel=0.15)


@pytest.mark.parametrize("rate", [0.5, 5.0, 50.0])
def test_each_refused_client_has_a_place_of_its_own(rate):
    parts = make(waiting=4)
    drain(parts, rate=rate, seconds=120)
    waits = [refusal(parts, 1, 1).retry_after for _ in range(200)]
    assert all(0 < wait <= MAX_RETRY_AFTER for wait in waits)
    assert len(set(waits)) == 200
    seconds = Counter(math.ceil(wait) for wait in waits if wait < MIN_FAR_RETRY_AFTER)
    assert max(seconds.values()) <= 4, "more come in one second than the queue can hold"
    near = sorted(wait for wait in waits if wait < MIN_FAR_RETRY_AFTER)
    gaps = [later - earlier for earlier, later in itertools.pairwise(near)]
    assert min(gaps) >= 1 / rate or min(gaps) == pytest.approx(1 / 4)


def test_places_that_passed_are_forgotten():
    parts = make(waiting=4)
    drain(parts, rate=1.0, seconds=120)
    first = refusal(parts, 1, 1).retry_after
    for _ in range(20):
        refusal(parts, 1, 1)
    parts.drain_rate.watch(waited=True, waits=False)
    parts.clock.now += 60
    assert refusal(parts, 1, 1).retry_after == pytest.approx(first, rel=0.05)


def test_a_queue_that_stands_still_sends_clients_further_away_but_not_for_ever():
    parts = make(waiting=4)
    drain(parts, rate=1.0, seconds=30)
    waits = []
    for _ in range(12):
        parts.clock.now += 60.0
        waits.append(refusal(parts, 1, 1).retry_after)
    assert waits[0] > SLACK
    assert waits[0] < waits[1]
    assert MIN_FAR_RETRY_AFTER <= waits[-1] <= MAX_RETRY_AFTER  # the SDKs ignore longer ones


def test_the_drain_rate_follows_random_ends():
    generator = random.Random(1)
    clock = Clock()
    drain_rate = DrainRate(window=50.0, clock=clock)
    drain_rate.watch(waited=False, waits=True)
    for _ in range(2000):
        clock.now += generator.expovariate(5.0)
        drain_rate.watch(waited=True, waits=True)
        drain_rate.count()
    assert drain_rate.per_second() == pytest.approx(5.0, rel=0.25)


def test_an_idle_hour_says_nothing_of_the_rate():
    parts = make(waiting=4)
    drain(parts, rate=5.0, seconds=60)
    before = parts.drain_rate.per_second()
    parts.drain_rate.watch(waited=True, waits=False)
    parts.clock.now += 3600
    parts.drain_rate.watch(waited=False, waits=False)
    assert parts.drain_rate.per_second() == before


class SimulatedServer:
    """A queue before workers, in simulated time, with clients that come again when they are told, twice."""

    def __init__(self, *, num_workers: int, mean_seconds: float, limit: int, seed: int, whole_seconds: bool) -> None:
        self.parts = make(requests=limit, max_tokens=10**6)
        self.num_workers, self.mean_seconds, self.whole_seconds = num_workers, mean_seconds, whole_seconds
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_running = self.num_served = self.num_gone = self.most_waiting = 0
        self.numbers = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.parts.clock.now + seconds, next(self.numbers), do))

    def arrive(self, num_attempts: int = 1) -> None:
        try:
            place = self.parts.admission.admit(1, 1)
        except ApiError as error:
            if num_attempts == 3:
                self.num_gone += 1
                return
            wait = math.ceil(error.retry_after) if self.whole_seconds else error.retry_after
            self.after(wait, lambda: self.arrive(num_attempts + 1))
            return
        with place:
            place.hand_over(1)
            self.parts.engine.num_waiting += 1
        self.most_waiting = max(self.most_waiting, self.parts.engine.num_waiting)
        self.after(0.01, lambda: self.step(place))

    def step(self, place) -> None:
        if self.num_running < self.num_workers and self.parts.engine.num_waiting:
            self.parts.engine.num_waiting -= 1
            self.num_running += 1
            self.after(self.mean_seconds * self.random.uniform(0.5, 1.5), lambda: self.end(place))

    def end(self, place) -> None:
        place.end()
        self.num_running -= 1
        self.num_served += 1
        self.after(0.01, lambda: self.step(place))

    def run(self) -> None:
        while self.events:
            self.parts.clock.now, _, do = heapq.heappop(self.events)
            do()


@settings(deadline=None, max_examples=200)
@given(
    num_workers=st.sampled_from([1, 2, 8, 32]), mean_seconds=st.floats(0.05, 5), limit=st.integers(2, 64),
    share=st.floats(0.1, 0.5), seed=st.integers(0, 10**6), whole_seconds=st.booleans(),
)  # fmt: skip
def test_everybody_of_a_burst_gets_in_within_two_retries(
    num_workers: int, mean_seconds: float, limit: int, share: float, seed: int, whole_seconds: bool
) -> None:
    """As many as the server can serve within 20 s, all in the same instant, on a server that has measured nothing."""
    server = SimulatedServer(
        num_workers=num_workers, mean_seconds=mean_seconds, limit=limit, seed=seed, whole_seconds=whole_seconds
    )
    rate = min(num_workers / mean_seconds, limit)
    num_clients = min(int(share * 40 * rate), 500)
    for _ in range(num_clients):
        server.arrive()
    server.run()
    assert (server.num_served, server.num_gone) == (num_clients, 0)
    assert server.most_waiting <= limit
