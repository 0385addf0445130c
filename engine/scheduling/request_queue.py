"""Requests that wait for their first step or, preempted, for their next."""

from __future__ import annotations

import heapq
import time

from engine.scheduling.fair_share import FairShare, arrival_order
from engine.types import Sequence


class _TenantQueue:
    """A tenant's waiting sequences in `arrival_order`. Operations cost O(log n): removed entries stay in the heap until
    they are its first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self.members: set[int] = set()  # arrival numbers

    def push(self, seq: Sequence) -> None:
        self.members.add(seq.arrival)
        heapq.heappush(self._heap, (*arrival_order(seq), seq))

    @property
    def first(self) -> Sequence:
        while self._heap[0][1] not in self.members:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def remove(self, seq: Sequence) -> None:
        self.members.remove(seq.arrival)
        if len(self._heap) > 2 * len(self.members) + 64:  # mostly leftovers of an aborted burst
            self._heap = [entry for entry in self._heap if entry[1] in self.members]
            heapq.heapify(self._heap)


class WaitingQueue:
    """The waiting sequences of all tenants, in the order that `FairShare` gives them."""

    def __init__(self, fair_share: FairShare) -> None:
        self._fair_share = fair_share
        self._tenants: dict[str, _TenantQueue] = {}  # those that have sequences here
        self._num_seqs = 0

    def __len__(self) -> int:
        return self._num_seqs

    def push(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = _TenantQueue()
        queue.push(seq)
        self._num_seqs += 1

    @property
    def first(self) -> Sequence:
        """The sequence that is served next. There must be one."""
        assert self._tenants, "nobody waits"
        firsts = [queue.first for queue in self._tenants.values()]
        if len(firsts) == 1:
            return firsts[0]
        now = time.monotonic()
        return min(firsts, key=lambda seq: self._fair_share.order(seq, now))

    def pop(self) -> Sequence:
        """Removes and returns the first sequence. There must be one."""
        seq = self.first
        self.remove(seq)
        return seq

    def remove(self, seq: Sequence) -> bool:
        """Removes a sequence at any place in the queue; False if it is not in it."""
        queue = self._tenants.get(seq.request.tenant)
        if queue is None or seq.arrival not in queue.members:
            return False
        self._num_seqs -= 1
        queue.remove(seq)
        if not queue.members:
            del self._tenants[seq.request.tenant]
        return True
