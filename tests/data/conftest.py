"""Tokenizers and the data set, loaded once for all tests of this folder."""

from pathlib import Path

import pytest

from sphinx_jax.data import easy_vqa
from sphinx_jax.data.tokenizer import Tokenizer, train_tokenizer

MIXTRAL_TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def mixtral():
    """The tokenizer of the published checkpoints."""
    return Tokenizer(MIXTRAL_TOKENIZER)


@pytest.fixture(scope="session")
def train():
    return easy_vqa.load("train")


@pytest.fixture(scope="session")
def held_out():
    return easy_vqa.load("test")


@pytest.fixture(scope="session")
def small(train):
    """A small tokenizer with the settings of Llama's, trained on easy-vqa."""
    return Tokenizer(train_tokenizer(easy_vqa.texts(train), 512))


@pytest.fixture(scope="session")
def nano_tokenizer(train):
    """The tokenizer that the nano model trains with: it ignores case."""
    return Tokenizer(train_tokenizer(easy_vqa.texts(train), 512, fold_case=True))
