"""LoRA adapters against autodiff of merged weights, and LoRA runs: saving, resuming, merging and exporting."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax import checkpoints, config, lora_params
from sphinx_jax.checkpoints import loaded_model
from sphinx_jax.cli import common, convert, train
from sphinx_jax.config import LoraConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.training.program import train_program
from sphinx_jax.training.step import make_loss
from sphinx_jax.training.train_config import TrainConfig
from tests.training.test_killed import losses, write_data

SMALL = dataclasses.replace(config.nano().language, dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2)
CONFIG = config.SphinxConfig(language=SMALL, vision=None)
LORA = LoraConfig(rank=3, alpha=1.5)


def deltas(tree, scale):
    """scale x a b of each adapter by numpy, by the name of its matrix."""
    attention, ffn = tree["language"]["layers"]["attention"], tree["language"]["layers"]["ffn"]

    def product(factors, spec):
        return scale * np.einsum(spec, *(np.asarray(factors[name], np.float64) for name in "ab"))

    return {
        "wqkv": product(attention["wqkv_lora"], "ldr,lrkgh->ldkgh"),
        "wo": product(attention["wo_lora"], "lkghr,lrd->lkghd"),
        "w_in": product(ffn["w_in_lora"], "ledr,lerch->ledch"),
        "w_out": product(ffn["w_out_lora"], "lehr,lerd->lehd"),
    }


def with_deltas(base, added):
    layers = base["language"]["layers"]
    layers = layers | {
        part: layers[part] | {name: layers[part][name] + jnp.float32(added[name]) for name in names}
        for part, names in (("attention", ("wqkv", "wo")), ("ffn", ("w_in", "w_out")))
    }
    return base | {"language": base["language"] | {"layers": layers}}


def random_params(lora=None, seed=0):
    """The model's graph, and random parameters of deviation 0.2 by numpy."""
    graph, shapes = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, lora=lora, rngs=rngs), sharding.make_mesh())
    draw = np.random.default_rng(seed).normal
    return graph, jax.tree.map(lambda p: jnp.asarray(0.2 * draw(size=p.shape), jnp.float32), shapes)


def test_gradient_follows_from_the_merged_weights():
    """By the chain rule: for W + s a b with gradient G of W + s a b, they are s G b^T and s a^T G."""
    (graph, params), plain = random_params(LORA), random_params()[0]
    base, other = lora_params.split(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 512, (3, 20)))
    batch = {"tokens": tokens, "labels": tokens}
    dense = jax.jit(jax.value_and_grad(lambda p: make_loss(plain, CONFIG)({"model": p}, batch)[0]))
    adapted = jax.jit(jax.value_and_grad(lambda a: make_loss(graph, CONFIG)({"model": base, "adapters": a}, batch)[0]))
    zero = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key == "a"), other)
    assert adapted(zero)[0] == dense(base)[0]
    (loss, found), (expected, gradients) = adapted(other), dense(with_deltas(base, deltas(other, LORA.scale)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    whole = gradients["language"]["layers"]
    specs = {
        ("attention", "wqkv"): ("ldkgh,lrkgh->ldr", "ldr,ldkgh->lrkgh"),
        ("attention", "wo"): ("lkghd,lrd->lkghr", "lkghr,lkghd->lrd"),
        ("ffn", "w_in"): ("ledch,lerch->ledr", "ledr,ledch->lerch"),
        ("ffn", "w_out"): ("lehd,lerd->lehr", "lehr,lehd->lerd"),
    }
    for (part, name), (for_a, for_b) in specs.items():
        matrix, factors = np.asarray(whole[part][name]), other["language"]["layers"][part][f"{name}_lora"]
        ours = found["language"]["layers"][part][f"{name}_lora"]
        for factor, expected in (("a", (for_a, matrix, factors["b"])), ("b", (for_b, factors["a"], matrix))):
            expected = LORA.scale * np.einsum(*expected)
            np.testing.assert_allclose(ours[factor], expected, rtol=1e-4, atol=1e-6, err_msg=f"{name} {factor}")


def test_optimizer_state_is_of_adapters_only():
    """SPHINX-MoE on eight devices: bytes from the published shapes; the rank is not sharded."""
    train_config = TrainConfig(batch_size=8, stage="lora", lora_rank=16, lora_alpha=32.0, dtype="bfloat16")
    program = train_program(config.sphinx_moe(), train_config, sharding.make_mesh(tensor=4, fsdp=2))
    dim, hidden, rank, tensor, fsdp = 4096, 14336, 16, 4, 2
    qkv, heads = 48 * 128, 32 * 128
    attention = rank * (dim / fsdp + qkv / tensor + heads / tensor + dim / fsdp)
    experts = 8 * rank * (dim / fsdp + 2 * hidden / tensor + hidden / tensor + dim / fsdp)
    held = 32 * (attention + experts) * 4
    assert sharding.bytes_per_device(program.state.params) == held
    assert sharding.bytes_per_device(program.state.opt_state) == pytest.approx(2 * held, abs=64)
    model = jax.tree.leaves(program.frozen_params["model"])
    assert {leaf.dtype for leaf in model} == {jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs train.py on sums as text."""
    data = write_data(tmp_path_factory.mktemp("lora"))
    argv = ["--data", data, "--max-length", "64", "--batch-size", "8", "--log-every", "1"]
    return lambda *more: common.run(train.main, [*map(str, argv), *map(str, more)])


def save_base(path, seed):
    """A model with a tokenizer of the digits and the prompt template."""
    texts = [f"{i} plus {i % 7}?" for i in range(200)] + [Conversation.from_pairs([("plus", "9")]).text()] * 9
    checkpoints.save(path, CONFIG, random_params(seed=seed)[1], train_tokenizer(texts, SMALL.vocab_size))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("runs") / "base", seed=0)


def lora_argv(base, out, *more):
    stage = ("--stage", "lora", "--lora-rank", 3, "--lora-alpha", 6)
    return ("--init", base, *stage, "--steps", 4, "--save-every", 2, "--out", out, *more)


@pytest.fixture(scope="module")
def run(call, base):
    out = base.with_name("adapted")
    assert call(*lora_argv(base, out)) == 0
    return out


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_only_adapters_are_saved(run):
    adapters_size = 4 * sum(x.size for pair in checkpoints.open(run).adapters[0].factors.values() for x in pair)
    assert adapters_size < size(run / "adapters") < adapters_size + 50_000
    state = size(run / "checkpoints" / "4" / "state")
    assert 3 * adapters_size < state < 3 * adapters_size + 100_000


@pytest.mark.slow
def test_resume_is_exact_and_a_mesh_gives_the_same(call, run, base, tmp_path):
    shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    assert call(*lora_argv(base, tmp_path / "killed", "--resume")) == 0
    assert losses(tmp_path / "killed") == losses(run) and len(losses(run)) == 4
    mesh = ("--mesh.tensor", 2, "--mesh.expert", 2, "--mesh.fsdp", 2)
    assert call(*lora_argv(base, tmp_path / "mesh", *mesh)) == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(run), rtol=1e-3)


def test_merged_on_load_and_on_export(run, base, tmp_path):
    """The difference to the base is scale x a b by numpy, and nothing else; logits are those of the trained model."""
    before, after = (checkpoints.load(path, sharding.make_mesh(), unstacked=False).params for path in (base, run))
    saved = checkpoints.open(run).adapters[0].factors
    tree = {}
    for path, (a, b) in saved.items():
        part = tree.setdefault(path[-2], {})
        part[f"{path[-1]}_lora"] = {"a": a, "b": b}
    tree = {"language": {"layers": tree}}
    expected = with_deltas(before, deltas(tree, 2.0))
    assert float(np.abs(deltas(tree, 2.0)["w_out"]).max()) > 1e-4
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    names = {path[-1].key for path, flag in jax.tree_util.tree_leaves_with_path(changed) if flag}
    assert names == {"wqkv", "wo", "w_in", "w_out"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), after, expected)

    graph = sharding.abstract_params(
        lambda rngs: SphinxMoE(CONFIG, lora=LoraConfig(3, 6.0), rngs=rngs), sharding.make_mesh()
    )[0]
    tokens = np.random.default_rng(1).integers(1, 512, (2, 16))
    unmerged = jax.jit(lambda p: bind(graph, p)(jnp.asarray(tokens))[0])(lora_params.join(before, tree))
    np.testing.assert_allclose(sphinx_jax.load(run, sharding.make_mesh()).logits(tokens), unmerged, atol=1e-5)
    assert common.run(convert.main, [str(run), str(tmp_path / "out"), "--format", "accessory"]) == 0
    exported = checkpoints.load(tmp_path / "out", sharding.make_mesh(tensor=2), unstacked=False).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), exported, after)
    checkpoints.convert(run, tmp_path / "converted", "mixtral")
    converted = checkpoints.load(tmp_path / "converted", sharding.make_mesh(), unstacked=False).params
    np.testing.assert_array_equal(
        converted["language"]["layers"]["ffn"]["w_in"], after["language"]["layers"]["ffn"]["w_in"]
    )


def test_attention_adapters(call, base, tmp_path, capsys):
    """No other adapters are saved, and no other matrix of the base changes on load or export."""
    out = tmp_path / "run"
    assert call(*lora_argv(base, out, "--lora-target-modules", "attention")) == 0
    layers, dim, rank, groups = SMALL.num_layers, SMALL.dim, 3, SMALL.num_kv_heads
    factors = checkpoints.open(out).adapters[0].factors
    assert {key[-1]: [x.shape for x in pair] for key, pair in factors.items()} == {
        "wqkv": [(layers, dim, rank), (layers, rank, groups, 4, 4)],
        "wo": [(layers, groups, 2, 4, rank), (layers, rank, dim)],
    }
    before, after = (checkpoints.load(path, sharding.make_mesh(), unstacked=False).params for path in (base, out))
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert {p[-1].key for p, flag in jax.tree_util.tree_leaves_with_path(changed) if flag} == {"wqkv", "wo"}
    assert common.run(convert.main, [str(out), str(tmp_path / "out"), "--format", "accessory"]) == 0
    exported = checkpoints.load(tmp_path / "out", sharding.make_mesh(), unstacked=False).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), exported, after)
    assert call(*lora_argv(base, out, "--resume")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--lora-target-modules attention, not with" in last and last.endswith("modules all; give the same")


@pytest.mark.parametrize(("targets", "rank", "mib"), [("attention", 8, 18), ("attention", 16, 36), ("all", 8, 418)])
def test_adapter_bytes_of_the_published_model(targets, rank, mib):
    """As docs/fine-tuning.md states them: 32 layers, queries with keys and values 6144 wide, 8 experts of 14336."""
    abstract = loaded_model.abstract_adapters(config.sphinx_moe(), LoraConfig(rank, 1.0, targets))
    attention = 4096 + 6144 + 4096 + 4096
    experts = 8 * (4096 + 2 * 14336 + 14336 + 4096)
    numbers = 32 * rank * (attention + experts * (targets == "all"))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == numbers
    assert 4 * numbers / 2**20 == mib


def test_invalid_input_is_one_sentence(call, run, base, tmp_path, capsys):
    def message(code):
        assert code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--stage lora adapts a checkpoint" in message(call("--stage", "lora", "--out", tmp_path / "a"))
    assert "--lora-rank belongs to --stage lora" in message(call("--lora-rank", 4, "--out", tmp_path / "a"))
    assert "--lora-rank must be 1 or more" in message(call(*lora_argv(base, tmp_path / "a", "--lora-rank", 0)))
    assert "was started with --lora-rank 3" in message(call(*lora_argv(base, run, "--resume", "--lora-rank", 4)))
    assert "was started with --stage lora, not all" in message(call("--init", base, "--out", run, "--resume"))

    def load(path):
        return message(common.run(lambda _: sphinx_jax.load(path), []))

    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    info = tmp_path / "run" / "lora.json"

    def set_base(path):
        info.write_text(json.dumps(json.loads(info.read_text()) | {"base": str(path)}))

    set_base(tmp_path / "base")
    sphinx_jax.load(tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    save_base(tmp_path / "base", seed=1)
    assert "which has changed since" in load(tmp_path / "run")
    other = call(*lora_argv(tmp_path / "base", tmp_path / "run", "--resume"))
    assert "is another checkpoint" in message(other)
    set_base(tmp_path / "gone")
    assert "which does not exist; restore that checkpoint" in load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters")
    set_base(base)
    assert "is a run that has not ended" in load(tmp_path / "run")
