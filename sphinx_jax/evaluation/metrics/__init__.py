"""Metrics of the benchmarks, written from their official definitions; one idea a file."""
