"""Attention back ends: what stores a step's keys and values in the KV cache, and attends to what lies there.

Never allocates blocks. Begin with `backend.AttentionBackend`; one file per back end: torch, Numba, Triton.
"""
