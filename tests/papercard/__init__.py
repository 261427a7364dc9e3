"""torch's CUDA build without a card."""
