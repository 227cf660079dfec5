"""Training forward, gradients and optimizer steps against the original program's stored numbers, on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from sphinx_jax.checkpoints.formats import accessory
from sphinx_jax.checkpoints.mapping.language import language_mappings
from sphinx_jax.checkpoints.mapping.vision import vision_mappings
from sphinx_jax.model import bind
from sphinx_jax.training.optimizer import ENCODERS, adamw, decays, is_trainable, map_with_path
from sphinx_jax.training.step import next_token_losses
from tests.conftest import MESHES, mesh_name
from tests.vision.test_golden import golden_images

pytestmark = pytest.mark.optimized

ALL_AXES = {"tensor": 2, "expert": 2, "fsdp": 2}
QUICK = ("ens", {})
# The variants differ in their images alone, after which the meshes do the same.
SLOW = [("ens", ALL_AXES), ("ens5", {})]
CASES = [QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


class Run:
    """One variant's checkpoint on one mesh, with the results of a training forward and backward."""

    def __init__(self, variant, shape, directory, golden):
        self.expected, self.inputs = golden(f"{variant}/expected.npz"), golden(f"{variant}/inputs.npz")
        self.facts = golden(f"{variant}/expected.json")
        self.mesh = sharding.make_mesh(**shape)
        loaded = accessory.load(directory, self.mesh, "float32", unstacked=True)
        self.graph, self.config, params = loaded.graph, loaded.config, loaded.params
        # Everything but the encoders is trainable in the original's second stage.
        self.encoders = {name: params["vision"].pop(name) for name in ENCODERS}
        self.params = params
        used = self.facts["train_tokens_used"]
        self.tokens = jnp.asarray(self.inputs["examples"][:, :used])
        self.labels = jnp.asarray(self.inputs["labels"][:, : used + 1])
        self.images = jnp.asarray(golden_images(variant))
        with sharding.mesh_context(self.mesh):
            self.gradient = jax.jit(jax.value_and_grad(self.loss, has_aux=True))
            (self.total, self.out), self.grads = jax.device_get(self.gradient(self.params, self.encoders, self.images))

    def loss(self, params, encoders, images):
        # Images are an argument, not a constant: XLA folds constants at compile time with other roundings, which can
        # change the rounding of a pixel to half precision.
        all_params = params | {"vision": params["vision"] | encoders}
        logits, intermediates = bind(self.graph, all_params)(self.tokens, images)
        losses, _, counted = next_token_losses(jnp.pad(logits, ((0, 0), (0, 1), (0, 0))), self.labels)
        cross_entropy = losses.sum(where=counted) / counted.sum()
        balance = jnp.stack([layer["routing"].balance_loss for layer in intermediates["layers"]])
        out = {"logits": logits, "intermediates": intermediates, "cross_entropy": cross_entropy, "balance": balance}
        return cross_entropy + self.config.balance_weight * balance.mean(), out

    def published(self, tree):
        """Blocks of a parameter tree under the original's names."""
        mappings = language_mappings(self.config.language, "sparse", unstacked=True, prefix="llma.")
        mappings += vision_mappings(self.config.vision, self.config.language.dim)
        named = {}
        for mapping in mappings:
            if mapping.path[:1] == ("vision",) and mapping.path[1] in ENCODERS:
                continue
            leaf = tree
            for key in mapping.path:
                leaf = leaf[key]
            name = mapping.name if mapping.name.startswith("llma.") else f"llma.{mapping.name}"
            named[name] = mapping.to_published(np.asarray(leaf)[mapping.index])
        return named


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{mesh_name(case[1])}")
def run(request, golden_checkpoint, golden):
    variant, shape = request.param
    return Run(variant, shape, golden_checkpoint(variant, 1), golden)


def close(ours, theirs, norm=1e-5, largest=1e-4):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= norm * np.linalg.norm(theirs)
    assert np.abs(ours - theirs).max() <= largest


def test_hidden_states(run):
    e, intermediates = run.expected, run.out["intermediates"]
    at = e["hidden_positions"]
    close(intermediates["embedded"][:, at], e["train_layer0_in"])
    for i, layer in enumerate(intermediates["layers"]):
        close(layer["out"][:, at], e[f"train_layer{i}_out"])
        close(layer["ffn"][:, at[::4]], e[f"train_layer{i}_ffn"])
    close(intermediates["layers"][0]["attention"][:, at], e["train_layer0_attn"])
    close(intermediates["hidden"][:, at], e["train_norm_out"])


def test_routing_is_identical(run):
    e, at = run.expected, run.expected["hidden_positions"]
    for i, layer in enumerate(run.out["intermediates"]["layers"]):
        routing = layer["routing"]
        np.testing.assert_array_equal(np.sort(routing.experts[:, at]), e[f"train_layer{i}_experts"])
        close(routing.logits[:, at], e[f"train_layer{i}_gate_logits"])
        counts = np.bincount(np.asarray(routing.experts).ravel(), minlength=routing.logits.shape[-1])
        np.testing.assert_array_equal(counts, e[f"train_layer{i}_tokens_per_expert"])


def test_logits(run):
    e, logits = run.expected, np.asarray(run.out["logits"])
    close(logits[..., ::125], e["train_logits_cols"])
    close(np.asarray(jax.nn.logsumexp(logits, axis=-1)), e["train_logits_lse"])
    np.testing.assert_array_equal(logits.argmax(-1), e["train_logits_argmax"])
    close(logits[0, -1], e["train_logits_full_lastpos"])


def test_losses(run):
    e = run.expected
    np.testing.assert_allclose(run.out["cross_entropy"], e["c_loss"], rtol=1e-5)
    np.testing.assert_allclose(run.out["balance"], e["load_balancing_per_layer"], rtol=1e-5)
    np.testing.assert_allclose(run.total, e["total_loss"], rtol=1e-5)
    np.testing.assert_allclose(run.config.balance_weight, e["load_balancing_weight"], rtol=1e-6)


def test_gradients(run):
    e, ours = run.expected, run.published(run.grads)
    ours["llma.tok_embeddings.weight[ids]"] = ours["llma.tok_embeddings.weight"][e["grad_tok_embeddings_ids"]]
    compared = 0
    for key in e:
        if key.startswith("grad:"):
            name = key.removeprefix("grad:")
            for suffix, step in (("[::16]", 16), ("[::125]", 125)):
                if name.endswith(suffix):
                    ours[name] = ours[name.removesuffix(suffix)][::step]
            close(ours[name], e[key], norm=1e-4, largest=1e-3)
            compared += 1
    assert compared == 18
    norms = run.facts["grad_norm_per_param"]
    assert set(norms) == {name for name in ours if "[" not in name}
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=1e-4, err_msg=name)


def test_four_optimizer_steps(run):
    """AdamW with decay groups and clipping: losses, gradient norms and parameters after the original's four steps."""
    trajectory = run.facts["adamw_trajectory"]
    rates = jnp.array([step["lr"] for step in trajectory["steps"]])
    settings = trajectory["settings"]
    optimizer = adamw(
        lambda count: rates[count], weight_decay=settings["weight_decay"], clip_norm=settings["clip_grad"]
    )

    # Placed elsewhere, the parameters would have the gradient compiled again.
    placed = jax.tree.map(lambda leaf: leaf.sharding, run.params)

    @partial(jax.jit, out_shardings=(placed, None, None))
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    with sharding.mesh_context(run.mesh):
        params, state = run.params, optimizer.init(run.params)
        for step in trajectory["steps"]:
            (total, out), grads = run.gradient(params, run.encoders, run.images)
            np.testing.assert_allclose(out["cross_entropy"], step["c_loss"], rtol=1e-4)
            np.testing.assert_allclose(total, step["total"], rtol=1e-4)
            params, state, norm = update(params, state, grads)
            np.testing.assert_allclose(norm, step["grad_norm"], rtol=1e-4)
    ours = run.published(jax.device_get(params))
    for key, value in run.expected.items():
        if key.startswith("after4steps:"):
            close(ours[key.removeprefix("after4steps:")], value, norm=1e-4, largest=1e-3)


def test_weight_decay_groups(run, golden):
    flags = run.published(map_with_path(lambda path, leaf: np.full(leaf.shape, decays(path)), run.params))
    groups = golden("params.json")["mixtral_sparse_ens"]
    assert {name for name, flag in flags.items() if flag.all()} == set(groups["decay"])
    assert {name for name, flag in flags.items() if not flag.any()} == set(groups["no_decay"])


def test_trainable_parameters(run, golden):
    """The original's trainable sets by stage; the encoders, which `run.params` lacks, are frozen in all of them."""
    sets = golden("params.json")
    expected = {
        "mm_stage2": sets["mixtral_sparse_ens5:mm_stage2"]["trainable"],
        "mm_stage1": sets["mixtral_sparse_ens5:mm_stage1"]["trainable"],
        "language": sets["mixtral_sparse_ens:no_visual"]["trainable"],
    }
    for stage, names in expected.items():
        flags = map_with_path(
            lambda path, leaf, stage=stage: np.full(leaf.shape, is_trainable(path, stage)), run.params
        )
        assert {name for name, flag in run.published(flags).items() if flag.all()} == set(names)
        assert not any(is_trainable(("vision", encoder, "kernel"), stage) for encoder in ENCODERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "shape"),
    # Both variants have the same weights.
    [*(("ens", shape) for shape in MESHES), ("ens5", {})],
    ids=lambda value: value if isinstance(value, str) else mesh_name(value),
)
def test_two_shards_load_as_one(variant, shape, golden_checkpoint):
    mesh = sharding.make_mesh(**shape)
    one, two = (accessory.load(golden_checkpoint(variant, shards), mesh, unstacked=True) for shards in (1, 2))
    assert one.config == two.config
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), one.params, two.params)
    assert all(jax.tree.leaves(same))


def test_text_without_an_image(run):
    """The same conversations without the image: logits of the last eight positions, and both losses."""
    e = run.expected

    @jax.jit
    def text_only(params, encoders):
        logits, intermediates = bind(run.graph, params | {"vision": params["vision"] | encoders})(run.tokens)
        losses, _, counted = next_token_losses(jnp.pad(logits, ((0, 0), (0, 1), (0, 0))), run.labels)
        balance = jnp.stack([layer["routing"].balance_loss for layer in intermediates["layers"]]).mean()
        return logits, losses.sum(where=counted) / counted.sum(), balance

    with sharding.mesh_context(run.mesh):
        logits, cross_entropy, balance = jax.device_get(text_only(run.params, run.encoders))
    last = logits[:, -8:]
    close(last[..., ::125], e["textonly_logits_cols"])
    close(np.asarray(jax.nn.logsumexp(last, axis=-1)), e["textonly_logits_lse"])
    np.testing.assert_array_equal(last.argmax(-1), e["textonly_logits_argmax"])
    np.testing.assert_allclose(cross_entropy, e["textonly_c_loss"], rtol=1e-5)
    np.testing.assert_allclose(balance, e["textonly_load_balancing_loss"], rtol=1e-5)
