"""Element formats of weights, tables and KV caches, as the integers that stand for them in operations."""

from __future__ import annotations

import torch

FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 = range(5)  # of packed matrices; tables have the first three, KV caches INT8 too
ROUNDED_BFLOAT16 = 5  # of products: BFLOAT16, whose other factor is rounded to bfloat16 too
QUAD_INT8, QUAD_INT4 = 6, 7  # INT8 and INT4 in the layout that rows of 8-bit integers are multiplied by
IN_QUADS = {INT8: QUAD_INT8, INT4: QUAD_INT4}
NAMES = {
    FLOAT32: "float32", BFLOAT16: "bfloat16", FLOAT16: "float16", INT8: "int8", INT4: "int4",
    QUAD_INT8: "int8, by activations of 8 bits", QUAD_INT4: "int4, by activations of 8 bits",
}  # fmt: skip
SIZES = {FLOAT32: 4.0, BFLOAT16: 2.0, FLOAT16: 2.0, INT8: 1.0625, INT4: 0.625}  # bytes of an element, scales included
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
FORMAT_OF = {dtype: kind for kind, dtype in DTYPES.items()}
