"""What the user wants: typed, checked, every problem at once. Nothing here imports torch."""
