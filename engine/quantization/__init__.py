"""How weight matrices are stored, and the products with them.

Never knows which layer of which model a matrix is. Begin with `linear`, whose layers own a method each; `method` has
the formats there are and torch's of them, `numba_cpu` the compiled kernels', `triton_gpu` a GPU's.
"""
