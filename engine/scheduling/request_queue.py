"""Requests that wait for their first step or, preempted, for their next."""

from __future__ import annotations

import heapq

from engine.types import Sequence


class WaitingQueue:
    """The waiting sequences by priority, then arrival. Operations cost O(log n): removed entries stay in the heap until
    they are its first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._members: set[int] = set()  # arrival numbers

    def __len__(self) -> int:
        return len(self._members)

    def push(self, seq: Sequence) -> None:
        self._members.add(seq.arrival)
        heapq.heappush(self._heap, (seq.request.priority, seq.arrival, seq))

    @property
    def first(self) -> Sequence:
        """The sequence that is served next. There must be one."""
        assert self._members, "nobody waits"
        while self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def pop(self) -> Sequence:
        """Removes and returns the first sequence. There must be one."""
        seq = self.first
        heapq.heappop(self._heap)
        self._members.remove(seq.arrival)
        return seq

    def remove(self, seq: Sequence) -> bool:
        """Removes a sequence at any place in the queue; False if it is not in it."""
        if seq.arrival not in self._members:
            return False
        self._members.remove(seq.arrival)
        if len(self._heap) > 2 * len(self._members) + 64:  # mostly leftovers of an aborted burst
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
        return True
