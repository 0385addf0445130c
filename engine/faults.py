"""Faults that are not a request's: of the device, or of the engine as a whole."""

from __future__ import annotations

import torch


class EngineFaultError(RuntimeError):
    """The device, or the engine as a whole, has failed, and no later step in this process can be trusted.

    The process has to end. The server starts another one and replays the requests there.
    """


def check_device(error: BaseException) -> None:
    """Raises EngineFaultError from an error that the accelerator reported, or that was raised because of one.

    Such errors stick: a lost CUDA context, an illegal address or a failed assertion on the device is reported by every
    call from then on, whatever request it is for. Running out of memory is none of them.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.AcceleratorError):
            raise EngineFaultError(f"the device failed: {_first_line(cause)}") from error
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
