"""Every kernel against its definition, in float64, on inputs that are drawn anew for each run."""

from __future__ import annotations

from loadtest.gpu import check_attention, check_elementwise, check_moe, check_sampling
from loadtest.gpu.context import Context, Job


def jobs(context: Context) -> list[Job]:
    parts = (check_attention, check_elementwise, check_moe, check_sampling)
    return [job for part in parts for job in part.jobs(context)]
