"""The usage in the chunks of a stream."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from server.generation.choice import Delta
from server.generation.generation import Generation
from server.protocol.request_fields import StreamOptions
from server.protocol.responses import Usage


class StreamUsage:
    """Counts the tokens of the chunks of one stream, so that what a chunk says is what its reader has had."""

    def __init__(self, options: StreamOptions | None, generation: Generation) -> None:
        """Every chunk has a usage only where the last one has: `continuous_usage_stats` refines `include_usage`."""
        self._is_included = bool(options and options.include_usage)
        self._is_continuous = self._is_included and bool(options and options.continuous_usage_stats)
        self._generation = generation
        self._num_tokens = 0

    @property
    def is_continuous(self) -> bool:
        """Each chunk has its own."""
        return self._is_continuous

    def count(self, delta: Delta) -> None:
        """Call it before the chunk that has the delta's tokens is worded."""
        self._num_tokens += len(delta.token_ids)

    def of_chunk(self) -> Usage | UnsetType | None:
        if self._is_continuous:
            return self._generation.usage(num_output_tokens=self._num_tokens)
        return None if self._is_included else UNSET

    def of_end(self) -> Usage | None:
        """For the chunk after the last one; None: there is none."""
        return self._generation.usage() if self._is_included else None
