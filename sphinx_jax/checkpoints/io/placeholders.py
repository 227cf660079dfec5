"""Files that stand for others: pointers of git-lfs, and pages that a server sent in place of a file."""

from pathlib import Path

from sphinx_jax.errors import UserError


def check_real_file(file: Path, head: bytes) -> None:
    """Raises UserError, with the remedy, if the first bytes of a file are those of a placeholder."""
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in "
            f"{file.parent}"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise UserError(
            f"{file} is a web page, not the file itself: log in (for a gated model, accept its terms) and download it "
            "again"
        )
