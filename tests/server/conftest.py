"""One server on the shipped model for each file of tests that uses it."""

import pytest

import sharding
import sphinx_jax
from sphinx_jax.data import easy_vqa
from tests.instruments.serving import CONTEXT, NANO, data_url, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), *NANO) as server:
        yield server


@pytest.fixture(scope="session")
def held_out():
    """(data: URL, question, answer) of images that no training saw."""
    records = easy_vqa.load("test")
    chosen = [records[i] for i in range(6)]
    urls = [data_url(easy_vqa.image_file("test", record.id).read_bytes()) for record in chosen]
    asked = [record.questions[0] for record in chosen]
    return [(url, question.text, question.answer) for url, question in zip(urls, asked, strict=True)]


@pytest.fixture(scope="module")
def model():
    """The same model behind the Python interface, with the server's context."""
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), max_model_len=CONTEXT)
