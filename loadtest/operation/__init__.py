"""A server in operation: overload, tenants beside each other, and faults under load, with an account of every request.

Each scenario is a file in `scenarios/` and says at its top what has to hold; `stage.py` is what all of them work with.
It starts servers of ours, and knows their metrics and their process tree, nothing inside them. Begin with `runner.py`.
"""
