"""Saying in the log which form of an operation runs: once, however often it is traced."""

import functools
import logging

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Log `message`, unless it was logged before."""
    log.info(message)
