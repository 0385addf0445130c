"""What lies between the matrix products of a layer, under the names that `kernels.reference` has for it."""
