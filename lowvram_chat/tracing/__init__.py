"""One run on fake tensors: what it allocates and launches."""
