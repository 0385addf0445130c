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
        """`continuous_usage_stats` (a usage in every chunk) has no effect without `include_usage` (one at the end)."""
        self._is_included = bool(options and options.include_usage)
        self._is_continuous = self._is_included and bool(options and options.continuous_usage_stats)
        self._generation = generation
        self._num_tokens = 0

    @property
    def is_continuous(self) -> bool:
        """Whether each chunk has a usage."""
        return self._is_continuous

    def count(self, delta: Delta) -> None:
        """Counts a delta's tokens. To be called before the chunk of the delta is made."""
        self._num_tokens += len(delta.token_ids)

    def of_chunk(self) -> Usage | UnsetType | None:
        if self._is_continuous:
            return self._generation.usage(num_output_tokens=self._num_tokens)
        return None if self._is_included else UNSET

    def of_end(self) -> Usage | None:
        """The usage for a chunk of its own at the end; None where there is no such chunk."""
        return self._generation.usage() if self._is_included else None
