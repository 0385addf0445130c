"""The line that tells how a run goes: on a terminal only, so that logs and pipes stay clean."""

from __future__ import annotations

import time
from typing import NoReturn

from tqdm import tqdm

from loadtest.client.outcome import Answer, Outcome


class Progress:
    """One updating line on standard error: requests done, in flight and failed, output tokens per second so far."""

    def __init__(self, title: str = "", num_requests: int | None = None, *, is_shown: bool = False) -> None:
        hidden = None if is_shown else True  # None: on terminals
        self._bar: tqdm[NoReturn] = tqdm(total=num_requests, desc=title, unit="req", disable=hidden, leave=False)
        self._started_at = time.perf_counter()
        self._num_in_flight = self._num_failures = self._num_tokens = 0

    def sent(self) -> None:
        self._num_in_flight += 1

    def ended(self, outcome: Outcome) -> None:
        self._num_in_flight -= 1
        if isinstance(outcome, Answer):
            self._num_tokens += outcome.num_output_tokens
        else:
            self._num_failures += 1
        rate = self._num_tokens / (time.perf_counter() - self._started_at)
        self._bar.set_postfix_str(
            f"{rate:.0f} tok/s, {self._num_in_flight} in flight, {self._num_failures} failed", refresh=False
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
