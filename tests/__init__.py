"""Tests: unit (seconds), integration (a tiny model on the CPU), golden (loss curves)."""
