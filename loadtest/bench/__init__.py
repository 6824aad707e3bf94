"""Benchmark: how near the service comes to the raw runtime, and what early exit and the smaller model bring."""
