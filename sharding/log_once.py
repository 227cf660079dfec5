"""A remark that is logged once, however often the code that makes it runs."""

import functools
import logging


@functools.lru_cache(maxsize=4096)
def log_once(log: logging.Logger, message: str) -> None:
    """Log `message` at level info, the first time it is given."""
    log.info(message)
