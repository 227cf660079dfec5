"""Messages that are logged once per process, however often tracing repeats."""

import functools
import logging


@functools.lru_cache(maxsize=4096)
def log_once(log: logging.Logger, message: str) -> None:
    """Log `message` at level info on its first call only."""
    log.info(message)
