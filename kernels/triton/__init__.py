"""Kernels of a GPU, written in Triton: each wrapper has the signature of its definition in `kernels.reference`."""
