"""What the attention kernels compile to on chips that are not here."""

import pytest

EXPECTED = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the matrix instructions that big tiles should use
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes per program

TWO_TILES = {  # bytes of a tile of keys and one of values
    "llama-8b": 2 * 32 * 128 * 2,
    "gemma2-9b": 2 * 32 * 256 * 2,
    "smollm2": 2 * 32 * 64 * 2,
    "falcon-7b": 2 * 32 * 64 * 2,
    "qwen2-7b": 2 * 32 * 128 * 2,
    "phi2": 2 * 32 * 80 * 2,
    "phi3": 2 * 32 * 96 * 2,
    "gpt-oss": 2 * 64 * 64 * 2,
    "gemma-7b": 2 * 32 * 256 * 2,
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", EXPECTED)
@pytest.mark.parametrize("cases", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_attention_uses_tensor_cores_and_spills_nothing(compile_kernels, arch: int, cases: str) -> None:
    compiled = compile_kernels("compile_attention.py", arch, cases)
    assert {"prompt_kernel", "split_kernel", "combine_kernel", "store_kv_kernel"} == {one.kernel for one in compiled}
    for one in compiled:
        assert (one.stack, one.local) == (0, 0), f"{one} spills"
        assert one.shared <= MAX_SHARED[arch], one
        instructions = one.instructions
        if one.kernel == "prompt_kernel" and "float32" not in one.case:
            assert instructions[EXPECTED[arch]], one
        if one.kernel == "split_kernel" and "float32" not in one.case:
            is_small = one.case != "falcon-7b"  # 16 rows are a product of one warp; 71 heads are not
            assert instructions["HMMA" if is_small else EXPECTED[arch]], one
        if one.kernel in ("prompt_kernel", "split_kernel"):
            assert instructions["LDGSTS"], f"{one}: copies should run ahead of the products"
            tiles = TWO_TILES[one.case.split()[0]] // (2 if one.case.endswith("8") else 1)
            assert one.shared >= tiles, f"{one}: too little for keys and values in flight"
