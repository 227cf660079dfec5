"""Encoders and crops against the original program's outputs, from its own checkpoint files."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import sharding
from sphinx_jax.checkpoints.formats import accessory
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.vision.crops import CLIP_MEAN, CLIP_STD, encoder_inputs
from sphinx_jax.vision.ensemble import Ensemble
from sphinx_jax.vision.qformer import EvaViT
from tests.conftest import GOLDEN, mesh_name

pytestmark = pytest.mark.optimized

ALL_AXES = {"tensor": 2, "expert": 2, "fsdp": 2}
QUICK = ("ens", {})
# The variants differ in their crops alone, whose number is a batch size to the encoders.
SLOW = [("ens", ALL_AXES), ("ens5", ALL_AXES)]
CASES = [QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


def golden_images(variant: str) -> np.ndarray:
    """The reference batch: a photograph, and its mirror image."""
    pixels = np.asarray(Image.open(GOLDEN / variant / "image_padded_resized.png")).astype(np.float32)
    normalised = (pixels / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return np.stack([normalised, normalised[:, ::-1]])


def vision_outputs(model, images):
    """What the model returns, and its encoders on the way: called by themselves they would be compiled twice."""
    seen = {}

    def recorded(cls, name):
        method = getattr(cls, name)
        patch.setattr(cls, name, lambda *args, **options: seen.setdefault(cls, method(*args, **options)))

    with pytest.MonkeyPatch.context() as patch:
        recorded(EvaViT, "__call__")
        recorded(Ensemble, "features")
        image_embeds = model(images)
    others = {"vit": seen[EvaViT], "image_embeds": image_embeds, "with_markers": model.add_markers(image_embeds)}
    return seen[Ensemble] | others


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{mesh_name(case[1])}")
def run(request, golden_checkpoint, golden):
    """One variant on one mesh: our outputs under the original's names and token stride, and the original's."""
    variant, shape = request.param
    mesh = sharding.make_mesh(**shape)
    loaded = accessory.load(golden_checkpoint(variant, 1), mesh, "float32")
    images = golden_images(variant)
    images = jax.device_put(images, sharding.named_sharding(("batch", None, None, None), images.shape, mesh))

    @jax.jit
    def compute(params, images):
        return vision_outputs(bind(loaded.graph, params).vision, images)

    with sharding.mesh_context(mesh):
        out = jax.device_get(compute(loaded.params, images))
    stride = golden(f"{variant}/expected.json")["feature_token_stride"]
    ours = {
        "feat_blip_vision": out["vit"][:, ::stride],
        "feat_qformer": out["qformer"],
        "feat_clip": out["clip"][:, ::stride],
        "feat_dino": out["dino"][:, ::stride],
        "feat_convnext": out["convnext"][:, 1:][:, ::stride],
        "feat_convnext_gap": out["convnext"][:, 0],
        "encode_image": out["image_embeds"][:, :, ::stride],
        "start_img": out["with_markers"][0, 0],
        "end_img": out["with_markers"][0, -1],
    }
    return ours, golden(f"{variant}/expected.npz")


@pytest.mark.parametrize(
    "name",
    [
        "feat_blip_vision",
        "feat_qformer",
        "feat_clip",
        "feat_dino",
        "feat_convnext",
        "feat_convnext_gap",
        "encode_image",
        "start_img",
        "end_img",
    ],
)
def test_as_the_original(run, name):
    ours, expected = run
    ours, expected = ours[name], expected[name]
    assert_close(ours, expected.reshape(ours.shape))


def assert_close(ours, expected):
    difference = ours - expected
    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(expected)
    assert np.abs(difference).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ens", "ens5"])
def test_quick_gelu_as_the_original(variant, golden_checkpoint, golden):
    """CLIP's other activation, through to the image embeddings."""
    loaded = accessory.load(golden_checkpoint(variant, 1), sharding.make_mesh(), "float32")
    vision = loaded.config.vision
    vision = dataclasses.replace(vision, clip=dataclasses.replace(vision.clip, activation="quick_gelu"))
    config = dataclasses.replace(loaded.config, vision=vision)
    graph, _ = sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), loaded.mesh)

    @jax.jit
    def compute(params, images):
        return vision_outputs(bind(graph, params).vision, images)

    out = compute(loaded.params, golden_images(variant))
    clip, image_embeds = out["clip"], out["image_embeds"]
    expected = golden(f"{variant}/expected.npz")
    stride = 4 * golden(f"{variant}/expected.json")["feature_token_stride"]
    assert_close(clip[:, ::stride], expected["alt_quickgelu_feat_clip"])
    expected_embeds = expected["alt_quickgelu_encode_image_item0"]
    assert_close(image_embeds[0, :, ::stride].reshape(expected_embeds.shape), expected_embeds)


@pytest.fixture(scope="module")
def inputs(golden, golden_checkpoint):
    """Per variant: our input of each encoder, [crop, channel, row, column], and the original's arrays."""

    def of(variant: str):
        config = accessory.open_directory(golden_checkpoint(variant, 1)).config.vision
        ours = jax.jit(lambda images: encoder_inputs(images, config))(golden_images(variant))
        ours = {name: np.asarray(crops).transpose(0, 3, 1, 2) for name, crops in ours.items()}
        return ours, golden(f"{variant}/expected.npz")

    return {variant: of(variant) for variant in ("ens", "ens5")}


@pytest.mark.parametrize(
    ("variant", "name", "encoder", "crops"),
    [
        ("ens", "local_image_224", "clip", 0),
        ("ens", "local_image_224_item1_sub", "clip", 1),
        ("ens", "image_for_convnext_sub", "convnext", slice(None)),
        ("ens", "image_for_dino_sub", "dino", slice(None)),
        ("ens5", "local_224_crops_item0_sub", "clip", slice(0, 5)),
        ("ens5", "local_224_crops_item1_sub", "clip", slice(5, 10)),
        ("ens5", "local_224_crop0_item0", "qformer", 0),
        ("ens5", "local_512_crops_sub", "convnext", slice(None)),
        ("ens5", "local_512_crop0_item0_sub", "convnext", 0),
        ("ens5", "image_for_dino_sub", "dino", slice(None)),
    ],
)
def test_inputs_as_the_original(inputs, variant, name, encoder, crops):
    ours, expected = inputs[variant]
    expected, ours = expected[name].astype(np.float32), ours[encoder][crops]
    step = -(-ours.shape[-1] // expected.shape[-1])
    difference = np.abs(ours[..., ::step, ::step] - expected)
    if encoder == "dino":
        assert difference.max() <= 1e-6
    else:
        # On the CPU that computed the reference no pixel differs. On another one the last bit of a sum may change the
        # rounding to half of a few: at most one in 10,000, by one step between half-precision numbers.
        assert (difference > 0).mean() <= 1e-4
        assert difference.max() <= 2.0**-9
