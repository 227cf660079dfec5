"""Where the files of benchmarks and their images are: below one folder, in whatever layout they were unpacked."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from sphinx_jax.errors import UserError


class DataFolder:
    """The folder `--data`, and in it `annotations`, `data` and the folders of single benchmarks.

    Where a name as written does not exist, its case is ignored: the original program's files name
    `data/GQA`, and its scripts `data/gqa`.
    """

    def __init__(self, root: Path):
        self.root = root
        if not root.is_dir():
            raise UserError(f"--data {root}: is not a folder; give the one that holds the benchmarks' files")
        first = [root, root / "annotations", root / "data"]
        inner = [path for folder in (root, root / "data") if folder.is_dir() for path in sorted(folder.iterdir())]
        self._folders = list(dict.fromkeys(path for path in [*first, *inner] if path.is_dir()))

    def find(self, name: str) -> Path | None:
        """The file or folder of this name in any of the folders; None if there is none."""
        return next((path for folder in self._folders if (path := folder / name).exists()), None)

    def image(self, name: str, folders: Sequence[str] = ()) -> Path:
        """The file of an image: the name below the folder, as written, or its last part in one of `folders`.

        Raises UserError if there is none.
        """
        for path in self._places(name, folders):
            if (found := _resolve(path)) is not None:
                return found
        raise UserError(f"{name}: there is no such image under {self.root}")

    def _places(self, name: str, folders: Sequence[str]) -> Iterator[Path]:
        yield self.root / name
        yield Path(name)
        parts = PurePosixPath(name).parts
        if parts[:1] == ("data",):
            yield self.root.joinpath(*parts[1:])
        for folder in folders:
            for base in (self.root, self.root / "data"):
                yield base / folder / name
                yield base / folder / parts[-1]


def _resolve(path: Path) -> Path | None:
    """The path, whatever the case of its parts; None if there is no such file."""
    try:
        if path.is_file():
            return path
        found = _other_case(path) if len(path.parts) > 1 else None
        return found if found is not None and found.is_file() else None
    except (OSError, ValueError):
        # No name of a file: too long, or with a NUL.
        return None


def _other_case(path: Path) -> Path | None:
    folder = _folder(path.parent)
    name = None if folder is None else _names(folder).get(path.name.lower())
    return None if folder is None or name is None else folder / name


@functools.lru_cache(maxsize=1024)
def _folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    return _other_case(path) if path.parent != path else None


@functools.lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their lower case."""
    return {path.name.lower(): path.name for path in sorted(folder.iterdir(), reverse=True)}
