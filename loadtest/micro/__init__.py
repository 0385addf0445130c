"""Looks inside Peregrine, in one process: what a step, a token or an operation costs here.

Each file is a command of its own, `python -m loadtest.micro.NAME`, and says what it measures and decides.
"""

from loadtest.extra import check_extra

check_extra("tabulate")
