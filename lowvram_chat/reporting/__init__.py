"""Pages, charts and terminal tables."""
