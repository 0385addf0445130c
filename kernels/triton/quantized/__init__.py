"""Products with quantised matrices: integers of 2 to 8 bits and 4-bit floats in groups, int8 and FP8 on both sides.

Begin with `packing`, which says how a matrix lies in memory; `kernels.reference.quantized` defines the arithmetic.
"""
