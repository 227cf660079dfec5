"""The directory of what is compiled, and users who have none."""

import pwd
from pathlib import Path

import jax
import pytest

from sphinx_jax.cli.common import enable_compilation_cache
from sphinx_jax.kernels import native_library
from sphinx_jax.user_cache import cache_directory


@pytest.fixture
def no_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path("/home/me/.cache/sphinx-jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_directory() == Path("/scratch/sphinx-jax")


@pytest.fixture
def not_cached():
    """jax without the directory that the tests give it."""
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", directory)


def test_commands_cache_nothing_without_a_home(no_home, not_cached):
    assert cache_directory() is None
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_products_run_in_loops_without_a_home(no_home, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "c++")
    assert not native_library._load.__wrapped__()
    assert "no home directory" in caplog.text and "set XDG_CACHE_HOME" in caplog.text
