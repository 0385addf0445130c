"""Safetensors checkpoints whose matrices are quantised: what their headers say of each, and how its tensors are read.

A room of `engine.loading`. Begin with `checkpoint`, which knows the methods; each has a file of its own. What a matrix
is comes from the shapes of its tensors, and from the config only what those cannot say.
"""
