"""The self-test of a machine: what a run relies on, tried on the device that is there."""
