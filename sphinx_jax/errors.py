"""The one error that is the user's to mend."""


class UserError(Exception):
    """Something the user can put right: the message is one sentence that names the file or flag and the remedy.

    Entry points print it as `error: ...` and exit with code 2; a traceback means a fault of ours.
    """
