"""Weights, adapters and the loss."""
