"""What norms, activations, sampling and experts compile to on chips that are not here."""

import pytest

PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # of tiles with 64 rows and more
KERNELS = {
    "rms_norm_kernel",
    "gated_kernel",
    "qkv_kernel",
    "chunk_max_kernel",
    "histogram_kernel",
    "chunk_kernel",
    "reduce_kernel",
    "penalise_kernel",
    "score_kernel",
    "apply_masks_kernel",
    "route_kernel",
    "grouped_kernel",
}
OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [90, *OTHERS])
def test_the_kernels_around_attention_spill_nothing(compile_kernels, arch: int) -> None:
    compiled = compile_kernels("compile_others.py", arch, "all")
    assert {one.kernel for one in compiled} == KERNELS
    for one in compiled:
        assert (one.stack, one.local) == (0, 0), f"{one} spills"
        if one.kernel == "grouped_kernel":
            assert one.instructions["HMMA" if one.case == "moe decode" else PRODUCTS[arch]], one
            assert one.instructions["LDGSTS"], f"{one}: copies should run ahead of the products"
