"""Benchmarks: records read from their files, and metrics as their official scripts define them."""
