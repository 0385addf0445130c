"""The HTTP requests in flight, by id, which an abort or a deadline may end early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from server.errors import ApiError

T = TypeVar("T")


class ActiveRequest:
    """One HTTP request in flight. Made in the event loop; `close` it when it has ended.

    One timer watches its deadline, however many tokens come before: it interrupts whoever waits in `next` then.

    deadline: in the event loop's time, seconds; None: it may take as long as it takes.
    """

    def __init__(self, deadline: float | None) -> None:
        self._reason: ApiError | None = None
        self._is_late = False
        self._waits: dict[asyncio.Task[object], int] = {}  # to how many requests to be cancelled each had before
        self._interrupted: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._pass_deadline)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def abort(self, reason: ApiError) -> None:
        """Ends the request: whoever waits for its output gets `reason` raised, now or at the next wait."""
        if self._reason is None:
            self._reason = reason
            self._interrupt()

    async def next(self, items: AsyncGenerator[T, None]) -> T:
        """The next item. Raises TimeoutError at the deadline, the reason of an abort, and StopAsyncIteration.

        After the first two the generator is closed: they interrupt it where it waits. What is there without a wait is
        handed out after the deadline too.
        """
        if self._reason is not None:
            raise self._reason
        if self._is_late:
            async with asyncio.timeout(0):
                return await anext(items)
        task = asyncio.current_task()
        assert task is not None
        self._waits[task] = task.cancelling()
        try:
            return await anext(items)
        except asyncio.CancelledError:
            if task in self._interrupted and task.cancelling() <= self._waits[task] + 1:  # else others cancel it too
                raise self._reason or TimeoutError from None
            raise
        finally:
            del self._waits[task]
            if task in self._interrupted:
                self._interrupted.remove(task)
                task.uncancel()

    def _pass_deadline(self) -> None:
        self._is_late = True
        self._interrupt()

    def _interrupt(self) -> None:
        for task in self._waits:
            if task not in self._interrupted:  # else the deadline or an abort came first, in this very moment
                self._interrupted.add(task)
                task.cancel()


class ActiveRequests:
    """Several requests of a tenant may carry the same id, such as a retry and what it retries: an abort ends them all.

    Another tenant's id is another id, whatever it looks like.
    """

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str], set[ActiveRequest]] = {}  # by tenant and id

    def __len__(self) -> int:
        return len(set().union(*self._by_id.values()))

    @contextmanager
    def register(self, tenant: str, ids: tuple[str, ...], deadline: float | None) -> Iterator[ActiveRequest]:
        active = ActiveRequest(deadline)
        names = [(tenant, request_id) for request_id in ids]
        for name in names:
            self._by_id.setdefault(name, set()).add(active)
        try:
            yield active
        finally:
            active.close()
            for name in names:
                self._by_id[name].discard(active)
                if not self._by_id[name]:
                    del self._by_id[name]

    def abort(self, tenant: str, request_id: str) -> bool:
        """Ends the tenant's requests of that id. False if there is none."""
        found = self._by_id.get((tenant, request_id))
        for active in found or ():
            active.abort(ApiError(409, f"request {request_id} was aborted", code="request_aborted"))
        return found is not None
