"""What products with quantised matrices compile to on chips that are not here."""

import pytest

EXPECTED = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the matrix instructions of floats of 16 bits
OF_BYTES = {"int8": {80: "IMMA", 90: "IGMMA", 100: "IMMA"}, "float8": {90: "QGMMA", 100: "UTCQMMA"}}
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes per program
CASES = ["short", "int4", "int8", "bits", "scales", "floats", "others", "experts", "scaled"]
KERNELS = {"quantized_kernel", "quantized_experts_kernel", "scaled_kernel"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", EXPECTED)
@pytest.mark.parametrize(
    "cases", [pytest.param(name, marks=[] if name == "short" else pytest.mark.slow) for name in CASES]
)
def test_products_use_tensor_cores_and_spill_nothing(compile_kernels, arch: int, cases: str) -> None:
    compiled = compile_kernels("compile_quantized.py", arch, cases)
    assert {one.kernel for one in compiled} & KERNELS
    for one in compiled:
        assert (one.stack, one.local) == (0, 0), f"{one} spills"
        assert one.shared <= MAX_SHARED[arch], one
        if one.kernel not in KERNELS or "float32" in one.case.split(", ")[-1]:
            continue
        kind = next((kind for kind in OF_BYTES if one.kernel == "scaled_kernel" and f"torch.{kind}" in one.case), None)
        assert one.instructions[EXPECTED[arch] if kind is None else OF_BYTES[kind][arch]], one
        assert one.instructions["LDGSTS"], f"{one}: copies should run ahead of the products"
