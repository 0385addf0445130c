"""Answers that follow a grammar: which tokens may come next, as a function of the tokens so far.

Never samples and never sees text. Begin with `engine/grammar.py` (what a grammar is).
"""
