"""Files that are not what their name says: pointers of git-lfs, web pages, dangling links, pipes."""

import stat
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


def check_regular(file: Path) -> None:
    """Raises UserError if a file is missing, a dangling link, or something that cannot be mapped, like a pipe."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if file.is_symlink():
            raise UserError(
                f"{file} is a link to {file.readlink()}, which is missing: download the checkpoint again"
            ) from error
        raise UserError(f"cannot read {file}: {error.strerror}; download it again, or make it readable") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot read {file}: it is not a regular file; put the checkpoint's own file there")
