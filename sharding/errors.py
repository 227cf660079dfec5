"""The error of this package."""


class LayoutError(ValueError):
    """A mesh, the axis rules and a shape do not fit together; the message says what would fit."""
