"""What a tenant may have beside others: its weight, and a quota of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import ApiError


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """weight: of its share of a busy engine; tokens_per_minute: of prompts and answers together, None: any number"""

    weight: float = 1.0
    tokens_per_minute: int | None = None


TermsOf = Callable[[str], TenantTerms]
NO_TERMS = TenantTerms()


class TokenQuotas:
    """A leaky bucket for each tenant with a quota: it holds a minute's tokens, and leaks as many in a minute.

    A request is let in while the bucket is not full, and what it then takes counts in full: prompts at once, answers
    when they end. So one request may overdraw, and the next wait for it. Unused minutes are not saved up.
    """

    def __init__(self, terms_of: TermsOf, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._terms_of, self._clock = terms_of, clock
        self._levels: dict[str, tuple[float, float]] = {}  # tokens, and when that was

    def check(self, tenant: str) -> None:
        """Raises ApiError 429 if the tenant has used up its quota."""
        most = self._terms_of(tenant).tokens_per_minute
        if most is None:
            return
        level = self._level(tenant, most)
        if level >= most:
            seconds = (level - most) * 60.0 / most
            raise ApiError(
                429,
                f"this API key has used {level:.0f} tokens of {most} per minute, prompts and answers together; try "
                f"again in {max(seconds, 1.0):.0f} s",
                code="quota_exceeded",
                retry_after=max(seconds, 1.0),
            )

    def charge(self, tenant: str, num_tokens: int) -> None:
        most = self._terms_of(tenant).tokens_per_minute
        if most is not None and num_tokens:
            self._levels[tenant] = (self._level(tenant, most) + num_tokens, self._clock())

    def _level(self, tenant: str, most: int) -> float:
        level, since = self._levels.get(tenant, (0.0, 0.0))
        return max(level - (self._clock() - since) * most / 60.0, 0.0)
