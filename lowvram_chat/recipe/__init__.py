"""Recipes: typed settings that are checked as a whole. Nothing in this folder imports torch."""
