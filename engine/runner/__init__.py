"""Runs a model on the batch of a step: eagerly, as CUDA graphs, ahead of the host, or strictly row by row.

Never decides who runs. Begin with `model_runner.ModelRunner`; `kernel_backend` chooses the parts that depend on
`device.kernels`.
"""
