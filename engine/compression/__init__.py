"""Checkpoints whose matrices are quantised, written from those that are not: what `peregrine quantize` does.

Its layout is that of the compressed-tensors library, which vLLM, SGLang and transformers read, and `engine.loading`
does. Begin with `checkpoint_job`, which puts the stages together; a matrix is rounded in `matrix_rounding`.
"""
