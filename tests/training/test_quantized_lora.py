"""Adapters on a quantized base: gradients against those on the dequantized base, and runs that are resumed."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sharding
import sphinx_jax
from sphinx_jax import checkpoints, lora_params, quantization
from sphinx_jax.checkpoints.quantized_base import load_quantized
from sphinx_jax.cli import common, train
from sphinx_jax.config import DecoderConfig, LoraConfig, SphinxConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.kernels.quantized import Quantized
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.training.step import make_loss
from tests.training.test_killed import Program, losses, write_data

CONFIG = SphinxConfig(DecoderConfig(128, 128, 2, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512), None)
MESH: dict[str, Any] = {"tensor": 2, "expert": 2, "fsdp": 2}
PACKED = ("--pack", "--grad-accum-steps", 2, "--remat", "block")
TOKENS = np.random.default_rng(0).integers(1, 512, (4, 20), np.int32)


def random_model(targets):
    """The abstract model, and random parameters of deviation 0.2 by numpy, the adapters' included."""
    lora = LoraConfig(rank=3, alpha=1.5, target_modules=targets)
    make = lambda rngs: SphinxMoE(CONFIG, lora=lora, rngs=rngs)  # noqa: E731
    _, shapes = sharding.abstract_params(make, sharding.make_mesh())
    draw = np.random.default_rng(0).normal
    return make, jax.tree.map(lambda p: jnp.asarray(0.2 * draw(size=p.shape), jnp.float32), shapes)


def quantize(tree, kind):
    def leaf(keys, value):
        return quantization.quantized(tuple(key.key for key in keys), value, kind)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def dequantize(tree):
    is_quantized = lambda p: isinstance(p, Quantized)  # noqa: E731
    return jax.tree.map(lambda p: p.astype(jnp.float32) if is_quantized(p) else p, tree, is_leaf=is_quantized)


def gradients(make, base, adapters, shape):
    """Loss and gradients of the adapters, on a mesh of `shape`, every layer rematerialised."""
    mesh = sharding.make_mesh(**shape)
    graph, _ = sharding.abstract_params(make, mesh)
    tokens = jnp.asarray(TOKENS)
    batch = {"tokens": tokens, "labels": tokens}
    loss = make_loss(graph, CONFIG, remat="block", dtype=jnp.float32)
    with sharding.mesh_context(mesh):
        step = jax.jit(jax.value_and_grad(lambda a, b: loss({"model": b, "adapters": a}, batch)[0]))
        return jax.device_get(step(adapters, base))


def place(tree, make, shape):
    """(base, adapters) of `tree` on a mesh of `shape`."""
    shardings = sharding.shardings_of(sharding.abstract_params(make, sharding.make_mesh(**shape))[1])
    return lora_params.split(jax.device_put(tree, shardings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets", "shapes"),
    [("int8", "all", [{}, MESH]), ("int4", "all", [{}, MESH]), ("int8", "attention", [{}])],
    ids=["int8", "int4", "attention"],
)
def test_gradients_are_those_on_the_dequantized_base(kind, targets, shapes):
    """To 1e-5 of the largest of each array, on one device and on a mesh that shards parameters along every axis."""
    make, params = random_model(targets)
    base, adapters = place(params, make, {})
    loss, expected = gradients(make, dequantize(quantize(base, kind)), adapters, {})
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    for shape in shapes:
        base, adapters = place(params, make, shape)
        found_loss, found = gradients(make, quantize(base, kind), adapters, shape)
        np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a tokenizer of the digits and the prompt template."""
    texts = [f"{i} plus {i % 7}?" for i in range(200)] + [Conversation.from_pairs([("plus", "9")]).text()] * 9
    _, params = random_model("all")
    path = tmp_path_factory.mktemp("quantized") / "base"
    checkpoints.save(path, CONFIG, lora_params.split(params)[0], train_tokenizer(texts, CONFIG.language.vocab_size))
    return path


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_base_is_quantized_layer_by_layer_as_a_whole_would_be(base, kind):
    mesh = sharding.make_mesh(**MESH)
    whole = checkpoints.load(base, mesh, unstacked=False)
    found = load_quantized(checkpoints.open(base), mesh, "float32", kind).params
    expected = quantize(whole.params, kind)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert sharding.shardings_of(found) == sharding.shardings_of(expected)


def argv(base, *more):
    return list(map(str, ["--init", base, "--stage", "lora", "--lora-rank", 3, "--lora-alpha", 6, *more]))


@pytest.fixture(scope="module")
def call(base):
    """Runs train.py on sums as text, adapters on `base`."""
    data = write_data(base.parent)
    shared = ["--data", str(data), "--max-length", "64", "--batch-size", "8", "--log-every", "1"]
    return lambda *more: common.run(train.main, [*shared, *argv(base, "--steps", 4, "--save-every", 2, *more)])


@pytest.fixture(scope="module")
def run(call, base):
    out = base.with_name("adapted")
    assert call("--quantize", "int8", *PACKED, "--out", out) == 0
    return out


@pytest.mark.slow
def test_a_mesh_changes_no_number(call, run, tmp_path):
    """The losses of every step are those on one device."""
    mesh = [f"--mesh.{axis}={size}" for axis, size in MESH.items()]
    assert call("--quantize", "int8", *PACKED, *mesh, "--out", tmp_path / "mesh") == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(run), rtol=1e-3)
    assert len(losses(run)) == 4


def test_adapters_are_a_checkpoint_of_the_unquantized_base(run, base):
    """Their size is as without quantization, and they are merged into the base as it was read."""
    assert json.loads((run / "lora.json").read_text())["quantize"] == "int8"
    before, after = (checkpoints.load(path, sharding.make_mesh(), unstacked=False).params for path in (base, run))
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    names = {path[-1].key for path, flag in jax.tree_util.tree_leaves_with_path(changed) if flag}
    assert names == {"wqkv", "wo", "w_in", "w_out"}


def test_served_beside_the_quantized_base_it_is_the_model_that_was_trained(run, base):
    """Logits of `--quantize int8 --adapters`, against the training program's forward pass."""
    mesh = sharding.make_mesh()
    lora = LoraConfig(rank=3, alpha=6)
    graph, _ = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, lora=lora, rngs=rngs), mesh)
    trained = load_quantized(checkpoints.open(base), mesh, "float32", "int8").params
    with ocp.StandardCheckpointer() as reader:
        weights = lora_params.join(trained, reader.restore(run / "adapters"))
    with sharding.mesh_context(mesh):
        expected = np.asarray(bind(graph, weights)(jnp.asarray(TOKENS))[0])
    model = sphinx_jax.load(base, mesh, "float32", quantize="int8", adapters={"mine": run})
    found, without = model.logits(TOKENS, adapter="mine"), model.logits(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(without - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.slow
def test_kill_and_resume_bit_for_bit(base, tmp_path):
    """kill -9 after a few steps of an int4 run, then to the end: losses and norms of the run that was not killed."""
    program = Program(tmp_path)
    program.argv += argv(base, "--quantize", "int4")
    out = tmp_path / "killed"
    process = program.start(out, 12)
    program.wait(process, lambda: (out / "checkpoints" / "5").is_dir())
    process.kill()
    process.communicate()
    assert not (out / "summary.json").exists()
    assert program.finish(out, 12) == program.uninterrupted(12)


def test_another_base_or_quantization_is_refused(call, run, base, tmp_path, capsys):
    def message(code):
        assert code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and last.count(". ") == 0
        return last

    shutil.copytree(run, tmp_path / "run")
    resumed = ("--out", tmp_path / "run", "--resume")
    assert "was started with --quantize int8, not with --quantize int4; give" in message(
        call("--quantize", "int4", *resumed)
    )
    assert "was started with --quantize int8, not without --quantize" in message(call(*resumed))
    ones = jax.tree.map(jnp.ones_like, checkpoints.load(base, sharding.make_mesh(), unstacked=False).params)
    checkpoints.save(tmp_path / "other", CONFIG, ones, (base / "tokenizer.model").read_bytes())
    other = call("--quantize", "int8", *resumed, "--init", tmp_path / "other")
    assert "is another checkpoint" in message(other)
    assert "--quantize belongs to --stage lora; add it" in message(
        common.run(train.main, ["--quantize", "int8", "--out", str(tmp_path / "a")])
    )
    checkpoints.convert(base, tmp_path / "stored", "native", quantize="int8")
    stored = call("--quantize", "int8", "--out", tmp_path / "a", "--init", tmp_path / "stored")
    assert "is stored quantized to int8: give --init the checkpoint" in message(stored)
