"""A server with two adapters: each is a model of its own, and requests of all are answered together."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import sharding
import sphinx_jax
from tests.instruments.adapters import save_adapters, save_base
from tests.instruments.serving import serving

pytestmark = pytest.mark.slow

PROMPTS = ["3 plus 4?", "17 plus 2?", "8 plus 8?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def directories(base):
    return save_adapters(base)


@pytest.fixture(scope="module")
def server(base, directories, tmp_path_factory):
    named = [f"{name}={path}" for name, path in directories.items()]
    sizes = ("--max-num-seqs", 4, "--max-model-len", 128)
    with serving(tmp_path_factory.mktemp("server"), "--checkpoint", base, "--adapters", *named, *sizes) as server:
        yield server


def test_models_are_the_base_and_its_adapters(server):
    cards = server.get("/v1/models").json["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [
        ("base", None),
        ("mine", "base"),
        ("theirs", "base"),
    ]
    assert server.get("/v1/models/mine").json["id"] == "mine"
    for answer in (server.get("/v1/models/nobody"), server.chat("3?", model="nobody"), server.chat("3?", model="")):
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found" and "or an adapter: mine, theirs" in answer.error["message"]


def test_requests_of_all_models_at_once(server, base, directories):
    model = sphinx_jax.load(base, sharding.make_mesh(), max_model_len=128, adapters=directories)
    asked = [(prompt, name) for prompt in PROMPTS for name in ("mine", "theirs", "base")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: server.chat(one[0], model=one[1], max_tokens=8).json, asked))
    expected = model.generate(
        [prompt for prompt, _ in asked],
        adapter=[None if name == "base" else name for _, name in asked],
        max_new_tokens=8,
    )
    assert [answer["model"] for answer in answers] == [name for _, name in asked]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    assert len(set(expected)) > 3


def test_echoed_logprobs_are_the_adapters(server, base, directories):
    model = sphinx_jax.load(base, sharding.make_mesh(), max_model_len=128, adapters=directories)
    tokens = model.tokenizer.encode("3 plus 4 plus 5", bos=True, eos=False)
    for name in ("base", "mine"):
        body = {"model": name, "prompt": tokens, "echo": True, "logprobs": 0, "max_tokens": 0}
        found = server.post("/v1/completions", body).json["choices"][0]["logprobs"]["token_logprobs"]
        expected = model.engine.prompt_logprobs(tokens, None if name == "base" else name).logprobs
        assert found[1:] == pytest.approx(expected, abs=1e-4)
