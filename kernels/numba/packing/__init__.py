"""Packing: weights in the layout and the formats that the register tiles read."""
