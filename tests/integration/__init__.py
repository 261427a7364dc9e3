"""Whole commands on a tiny model."""
