"""The error of this package."""


class LayoutError(ValueError):
    """A mesh, a rules table and a shape that do not fit together; the message says what would."""
