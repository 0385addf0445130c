"""The operations of a forward pass, and sampling's loops over a vocabulary: each computes some rows or columns."""
