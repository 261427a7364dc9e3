"""Traces one run on fake tensors: what it allocates and which kernels it launches."""
