"""Proposers: who guesses the next tokens of a sequence (speculative decoding).

A wrong guess costs time, never correctness; verification is `engine.sampling`'s. Begin with `proposer.Proposer`.
"""
