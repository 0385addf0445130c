"""Everything that is checked, tuned and measured on a GPU: `python -m loadtest.gpu`. Begin with `sections.py`.

A section is a module with `jobs`; it runs in processes of its own, so that none takes another along.
"""
