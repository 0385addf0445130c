"""Faults that are not a request's: of the device, or of the engine as a whole."""

from __future__ import annotations

import torch


class EngineFaultError(RuntimeError):
    """Nothing that runs in this process can be trusted any more.

    The process has to end; its requests go on in another one, which the server starts and hands them to.
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
