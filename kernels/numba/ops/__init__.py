"""The operations of a forward pass, and sampling's loops over a vocabulary.

Each function computes some rows or columns of its operation, on whichever thread of a team calls it.
"""
