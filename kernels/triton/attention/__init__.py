"""Attention over the paged KV cache: the wrapper, the plan of its programs, and the kernels."""
