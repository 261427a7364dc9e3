"""Fine-tune GPT-2-class chat models on a 4 GB graphics card, known to fit before the run starts."""

__version__ = "0.2.0"
