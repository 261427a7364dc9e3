"""Turns conversations into token rows."""
