"""Who runs in a step, for how many tokens, and what becomes of the tokens that come back.

Owns the life of a sequence inside the engine; never touches a tensor. Begin with `scheduler.Scheduler`.
"""
