"""Attention over the paged KV cache: the wrapper, the partition of its work among programs, and the kernels."""
