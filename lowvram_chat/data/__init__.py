"""Conversations become token rows."""
