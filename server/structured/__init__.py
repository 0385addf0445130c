"""Structured output as clients ask for it: what their fields mean as a grammar, and whether it can be enforced.

Never follows an answer: that is `engine/structured`. Begin with `structural_tags` (grammars of free text with
constrained parts, which tools use too).
"""
