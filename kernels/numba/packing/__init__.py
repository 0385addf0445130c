"""Weights in the order and the formats that the register tiles read."""
