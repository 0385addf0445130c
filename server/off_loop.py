"""Work whose size a client sets, done in threads beside the event loop: a few at a time, the others in order.

A thread alone does not keep the loop running: a call into C holds the interpreter's lock until it returns. So what runs
here either lets go of the lock (the tokenizer's batches, numpy) or is bounded in size, such that no single call takes
longer than a twentieth of a second.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NUM_THREADS = max(1, (os.cpu_count() or 1) // 2)  # the engine computes beside them
_THREADS = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="off-loop")


async def off_loop(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Runs the function in one of the threads. Waiting work keeps the memory of its arguments."""
    call = functools.partial(function, *arguments, **keywords)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, call)
