"""Faults injected for real: processes that are killed, files that are damaged, folders that are used twice."""
