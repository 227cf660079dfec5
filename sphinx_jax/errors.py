"""The error for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence that names the file or flag and the remedy.

    Entry points print it as `error: ...` and exit with code 2; a traceback means a bug.
    """
