"""Servers in turns: who starts, pauses and ends them, and what is measured meanwhile. Begin with `comparison.py`."""
