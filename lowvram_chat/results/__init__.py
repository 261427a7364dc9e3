"""Records of benchmark results: measured, stored as files, and compared."""
