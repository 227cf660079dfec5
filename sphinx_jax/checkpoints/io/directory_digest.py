"""A digest of a checkpoint's files that takes little reading: another model at the same path has another one."""

import hashlib
from pathlib import Path

_BLOCK_BYTES, _BLOCKS = 4096, 32

_FOLDERS = frozenset(("params", "adapters"))
"""What a directory of ours holds besides files. The other folders of a run are no part of the model."""
_SUFFIXES = frozenset((".json", ".model", ".jinja", ".safetensors", ".bin", ".pth", ".pt"))


def directory_digest(path: Path) -> str:
    """16 hexadecimal digits from the names and sizes of the model's files, and blocks that are spread over each.

    Copies have the digest of their original. Raises OSError if a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    own = [file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file()]
    inside = [file for folder in _FOLDERS for file in (path / folder).rglob("*") if file.is_file()]
    for file in sorted(own + inside):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb", buffering=0) as opened:
            for offset in dict.fromkeys(size * i // _BLOCKS for i in range(_BLOCKS)):
                opened.seek(offset)
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()
