"""Numbers that a refactor must not move."""
