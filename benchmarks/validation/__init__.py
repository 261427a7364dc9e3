"""The planner held against published measurements."""
