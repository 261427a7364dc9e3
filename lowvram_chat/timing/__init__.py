"""Predicts how long a step takes: fusion, roofline, speed."""
