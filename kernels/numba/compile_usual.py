"""Compiles what most models need, so that their first start need not: `python -m kernels.numba.compile_usual`."""

from __future__ import annotations

from importlib import import_module

from kernels.numba.ops.linear import compile_usual_products

if __name__ == "__main__":
    for module in ("program.team", "packing.levels", "ops.sampling"):  # which compile when they are imported
        import_module(f"kernels.numba.{module}")
    compile_usual_products()
