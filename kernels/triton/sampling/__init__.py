"""Sampling of a whole vocabulary: penalties and log-probabilities, truncation, and the choice of tokens."""
