"""The training run: preflight, trainer, callbacks, checkpoints, resuming, out-of-memory errors."""
