"""Names from files in messages: short, on one line, without control characters."""

_MAX_LETTERS = 120


def shorten(name: str) -> str:
    """A name for a message, cut in its middle if it is long."""
    if len(name) > _MAX_LETTERS:
        name = f"{name[: _MAX_LETTERS // 2]}...{name[-_MAX_LETTERS // 3 :]}"
    return name if name.isprintable() else repr(name)
