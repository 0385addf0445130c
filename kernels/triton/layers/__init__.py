"""The operations between the matrix products of a layer, under the names of `kernels.reference`."""
