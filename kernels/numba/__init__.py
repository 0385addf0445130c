"""Kernels of a CPU, compiled by Numba on import, and cached on disk (`kernel_cache`).

Import `kernels.numba.program.team` only where they will run: the first import on a machine compiles for some fifteen
seconds.
"""
