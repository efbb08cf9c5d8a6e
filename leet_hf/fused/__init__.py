"""Kernels for what surrounds the operator in a layer: each does in one launch what torch does in several."""
