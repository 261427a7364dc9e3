"""What works with no network: a tiny GPT-2, a sample of conversations, the chat template."""
