"""Predicts whether a run fits: allocator, runs, plan, search."""
