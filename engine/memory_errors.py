"""How errors say that memory ran out. Loads without torch, whose errors are told by name and text."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out, or the host's: then smaller work may succeed, and nothing else is wrong.

    torch has an error of its own for a GPU; its allocator on the host raises a RuntimeError, numpy's a MemoryError.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
