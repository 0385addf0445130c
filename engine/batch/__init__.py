"""One step as arrays: token ids, positions, slots, block tables, and their way to the device.

Never decides who runs, and never reads a model. Begin with `step_inputs.StepInputs`, then `device_inputs.ForwardBatch`.
"""
