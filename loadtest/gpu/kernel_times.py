"""How fast the kernels are: fractions of the floor, and others doing the same in turns."""

from __future__ import annotations

from loadtest.gpu import time_attention, time_elementwise, time_linear, time_moe, time_sampling
from loadtest.gpu.context import Context, Job


def jobs(context: Context) -> list[Job]:
    parts = (time_attention, time_elementwise, time_sampling, time_moe, time_linear)
    found = [job for part in parts for job in part.jobs(context)]
    return [*found, *time_attention.late_jobs(context), *time_linear.late_jobs(context)]
