"""Kernels of a CPU, compiled by Numba when they are first imported, and then kept on disk (`kernel_cache`).

Import `kernels.numba.program.team` only where they will run: the first import on a machine compiles for fifteen
seconds or so.
"""
