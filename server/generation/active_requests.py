"""The HTTP requests in flight, by id, which an abort or a deadline may end early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.errors import ApiError


class Interruptible(Protocol):
    """The interface of what a request waits for."""

    def fail(self, error: Exception) -> None:
        """Raises the error to whoever waits, now or later, when what has come is taken. The first error counts."""
        ...

    def cut(self, error: Exception) -> None:
        """The same, but drops what has come."""
        ...


class ActiveRequest:
    """One HTTP request in flight. Made in the event loop; `close` it when it has ended.

    One timer watches its deadline, however many tokens come before.

    deadline: in the event loop's time, seconds; None: it may take as long as it takes.
    """

    def __init__(self, outputs: Interruptible, deadline: float | None) -> None:
        self._outputs = outputs
        self._timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, outputs.fail, TimeoutError())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def abort(self, reason: ApiError) -> None:
        """Ends the request: whoever waits for its output gets `reason` raised, now or at the next wait."""
        self._outputs.cut(reason)


class ActiveRequests:
    """Several requests of a tenant may carry the same id, such as a retry and what it retries: an abort ends them all.

    Another tenant's id is another id, whatever it looks like.
    """

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str], set[ActiveRequest]] = {}  # by tenant and id

    def __len__(self) -> int:
        return len(set().union(*self._by_id.values()))

    @contextmanager
    def register(
        self, tenant: str, ids: tuple[str, ...], deadline: float | None, outputs: Interruptible
    ) -> Iterator[None]:
        """While it is open, the deadline fails the outputs with TimeoutError, and an abort cuts them."""
        active = ActiveRequest(outputs, deadline)
        names = [(tenant, request_id) for request_id in ids]
        for name in names:
            self._by_id.setdefault(name, set()).add(active)
        try:
            yield
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
