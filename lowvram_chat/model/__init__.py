"""Models: configuration, weights, adapters, loss, attention within documents, and saved models."""
