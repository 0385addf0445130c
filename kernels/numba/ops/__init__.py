"""The operations of a step, each compiled for ranges of its rows or columns."""
