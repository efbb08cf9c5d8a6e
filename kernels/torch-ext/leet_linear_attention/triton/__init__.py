"""Triton kernels of the operator. Import the submodules; nothing here runs before a kernel is wanted."""
