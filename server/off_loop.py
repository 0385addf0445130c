"""Thread pools beside the event loop, for work whose size a client chooses.

A thread alone does not keep the loop running. A call into C holds the interpreter's lock until it returns, and each
thread that wants the lock may have it before the loop does: with thirty-two of them the loop waited 0.7 s. So
Python code runs in one thread, in calls of a twentieth of a second at most, and code that releases the lock in a few
others.
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

_NUM_FREE = max(1, min(4, (os.cpu_count() or 1) // 2))  # the engine computes beside them
_PYTHON = ThreadPoolExecutor(1, thread_name_prefix="off-loop-python")
_FREE = ThreadPoolExecutor(_NUM_FREE, thread_name_prefix="off-loop-free")


async def off_loop(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Runs Python code in the one thread for it. Calls that wait for their turn keep their arguments in memory."""
    call = functools.partial(function, *arguments, **keywords)
    return await asyncio.get_running_loop().run_in_executor(_PYTHON, call)


async def off_lock(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Runs code that works mostly without the interpreter's lock, such as a tokenizer, in one of several threads."""
    call = functools.partial(function, *arguments, **keywords)
    return await asyncio.get_running_loop().run_in_executor(_FREE, call)
