"""Instruments that only tests use: what a compiled program writes to memory, and the bytes that it moves."""

from tests.instruments.hlo_traffic import Traffic, traffic
from tests.instruments.hlo_values import largest_values

__all__ = ["Traffic", "largest_values", "traffic"]
