"""Fair shares of a busy engine: who is served next when several tenants have work, and who makes room.

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv 2401.00588, algorithm 2):
each tenant has the count of tokens that it was served, an output token counting twice, divided by its weight, and the
tenant with the smallest count comes first. A tenant that comes back after a pause starts at the smallest count of those
that are busy, so that nobody saves up service. A tenant alone gets everything, and one that sends a thousand requests
waits behind itself.

Counts decide the order; a tenant that has nothing may find all seats or blocks taken by requests that run for minutes.
Then one that holds more than its share makes room (`victim`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from engine.types import Scheduled, Sequence

SECONDS_OF_PRIORITY = 30.0  # of waiting, that make up for one step of priority
OUTPUT_WEIGHT = 2  # of an output token, in prompt tokens: it costs a row of logits, and a step that others share

Order = tuple[int, float, float, int]


class FairShare:
    """The tenants with unfinished sequences, and what each was served. Costs nothing that counts while there is one."""

    def __init__(self) -> None:
        self._num_seqs: Counter[str] = Counter()  # unfinished ones
        self._weights: dict[str, float] = {}  # of tenants that have some
        self._served: dict[str, float] = {}  # tokens; of tenants without sequences too, if they had more than others
        self._floor = 0.0  # the count at which a tenant begins while nobody else is there

    @property
    def is_shared(self) -> bool:
        """Whether more than one tenant has unfinished sequences."""
        return len(self._num_seqs) > 1

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def add(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        if tenant not in self._num_seqs:
            floor = min((self._served[other] for other in self._num_seqs), default=self._floor)
            self._served[tenant] = max(self.served(tenant), floor)
        self._num_seqs[tenant] += 1
        self._weights[tenant] = seq.request.tenant_weight

    def remove(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        self._num_seqs[tenant] -= 1
        if self._num_seqs[tenant]:
            return
        del self._num_seqs[tenant], self._weights[tenant]
        if not self._num_seqs:
            self._floor = self._served[tenant]
        floor = min((self._served[other] for other in self._num_seqs), default=self._floor)
        for idle in [one for one, count in self._served.items() if one not in self._num_seqs and count <= floor]:
            del self._served[idle]  # it would begin there anyway

    def charge(self, batch: Iterable[Scheduled]) -> None:
        """Counts a step for those whose tokens it computes. Drafts are the server's idea, and cost nobody anything."""
        for item in batch:
            tokens = item.num_new_tokens - item.num_drafts + (OUTPUT_WEIGHT - 1 if item.samples else 0)
            tenant = item.seq.request.tenant
            self._served[tenant] += tokens / self._weights[tenant]

    def order(self, seq: Sequence, now: float) -> Order:
        """By what sequences are served, smallest first: priority with age, the tenant's count, then arrival."""
        tenant = seq.request.tenant
        return aged_priority(seq, now), self._served[tenant], *arrival_order(seq)

    def victim(
        self, needy: Sequence, running: list[Sequence], holding: Callable[[Sequence], int], needed: int, capacity: int
    ) -> Sequence | None:
        """The running sequence that makes room for one that waits: the newest of the tenant that holds most.

        None where the tenants' holdings are fair: if with `needed` more the waiting one's would pass its share of the
        capacity, or no other's is beyond its own. So a sequence that made room cannot claim the place back at once, and
        it does so once: a request that is larger than a share ends some day, too.

        holding: what a sequence has of the capacity, seats or blocks. Of no higher priority than the waiting one's.
        """
        held: Counter[str] = Counter()
        for seq in running:
            held[seq.request.tenant] += holding(seq)
        whole = capacity / sum(self._weights.values())
        shares = {tenant: whole * weight for tenant, weight in self._weights.items()}
        tenant = needy.request.tenant
        if held[tenant] + needed > shares[tenant]:
            return None
        candidates = [
            seq
            for seq in running
            if held[seq.request.tenant] > shares[seq.request.tenant]
            and seq.num_preemptions == 0
            and seq.request.priority >= needy.request.priority
        ]
        return max(
            candidates,
            key=lambda seq: (held[seq.request.tenant] / shares[seq.request.tenant], seq.arrival),
            default=None,
        )


def aged_priority(seq: Sequence, now: float) -> int:
    """A request's priority, of which waiting takes steps off, down to that of requests without any."""
    priority = seq.request.priority
    if priority <= 0:
        return priority
    return max(priority - int((now - seq.added_at) / SECONDS_OF_PRIORITY), 0)


def arrival_order(seq: Sequence) -> tuple[float, int]:
    """The order within a tenant: arrival, with a delay for each step of priority. It does not change with time."""
    return seq.added_at + seq.request.priority * SECONDS_OF_PRIORITY, seq.arrival
