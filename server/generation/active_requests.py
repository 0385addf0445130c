"""The HTTP requests in flight, by id, which an abort or a deadline may end early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from server.errors import ApiError

T = TypeVar("T")


class ActiveRequest:
    """One HTTP request in flight.

    deadline: in the event loop's time, seconds; None: it may take as long as it takes.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self._reason: ApiError | None = None
        self._waits: set[asyncio.Timeout] = set()

    def abort(self, reason: ApiError) -> None:
        """Ends the request: whoever waits for its output gets `reason` raised, now or at the next wait."""
        if self._reason is None:
            self._reason = reason
            now = asyncio.get_running_loop().time()
            for wait in self._waits:
                if not wait.expired():  # else the deadline came first, in this very moment
                    wait.reschedule(now)

    async def next(self, items: AsyncGenerator[T, None]) -> T:
        """The next item. Raises TimeoutError at the deadline, the reason of an abort, and StopAsyncIteration.

        After the first two the generator is closed: they interrupt it where it waits.
        """
        if self._reason is not None:
            raise self._reason
        wait = asyncio.timeout_at(self.deadline)
        try:
            async with wait:
                self._waits.add(wait)
                return await anext(items)
        except TimeoutError:
            if self._reason is not None:
                raise self._reason from None
            raise
        finally:
            self._waits.discard(wait)


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
