"""How weight matrices are stored, and the products with them.

Never knows which layer of which model a matrix is. Begin with `method`; `numba_cpu` packs for the compiled kernels.
"""
