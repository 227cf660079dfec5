"""The library of kernels for one CPU where it cannot be compiled, and where it was."""

import logging
import shutil

import jax
import pytest

from sphinx_jax.kernels import native_library


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load the library as a new process would, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: None)
    return native_library._load.__wrapped__


def test_without_a_compiler(load, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO):
        assert not load()
    assert "no C++ compiler" in caplog.text and "apt-get install g++" in caplog.text


def test_a_compiler_that_fails(load, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "sh -c 'echo nothing works >&2; exit 1'")
    assert not load()
    assert "nothing works" in caplog.text and not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written(load, monkeypatch, caplog, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CXX", "c++")
    assert not load()
    assert str(tmp_path / "cache") in caplog.text and "set XDG_CACHE_HOME" in caplog.text


def test_the_library_is_compiled_once(load, monkeypatch, tmp_path):
    compiler = next(filter(None, map(shutil.which, native_library.COMPILERS)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert load() and load()
    assert (tmp_path / "calls").read_text() == "called\n"
    assert [path.suffix for path in (tmp_path / "cache" / "sphinx-jax").iterdir()] == [".so"]
