"""A shared directory that becomes read-only in the middle of a run, and is writable again later."""

import contextlib
import subprocess

import pytest

from tests.cluster.test_faults import LONG, check_end, check_resumed, last_words
from tests.cluster.training import saved, wait_until
from tests.instruments.small_disk import small_disk

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def read_only(folder, twin):
    """`folder` is read-only for whoever opens a file in it; `twin` is an empty folder.

    A file system with open files cannot be remounted: it is mounted once more, read-only, over itself. Not in one
    step, in which files could be opened before the new mount is read-only.
    """
    subprocess.run(["mount", "--bind", "-o", "ro", folder, twin], check=True)
    try:
        subprocess.run(["mount", "--bind", twin, folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", twin], check=True)


@pytest.mark.slow
def test_directory_that_becomes_read_only(training, tmp_path):
    (twin := tmp_path / "twin").mkdir()
    with small_disk(tmp_path / "shared", "64m") as shared:
        out = shared / "run"
        with training.running(2, *LONG, "--out", out, folder=tmp_path) as processes:
            wait_until(lambda: len(saved(out)) > 1)
            with read_only(shared, twin):
                with pytest.raises(OSError, match="Read-only file system"):
                    (shared / "file").touch()
                check_end(processes, tmp_path)
        said = [words[0] for words in last_words(tmp_path)]
        assert any("Read-only file system" in word and str(out) in word for word in said), said
        check_resumed(training, out, tmp_path, 2)
