"""From outcomes to figures, files, tables and pages. Sends nothing.

Begin with `session.py`: it is what a command measured, and all that people read is made from it alone.
"""
