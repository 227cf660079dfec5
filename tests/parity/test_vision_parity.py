"""The encoders against other libraries' implementations, at small size with random weights.

Each library's tensors are renamed to the published names, and loaded with the parameter mappings of checkpoints.
"""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from sphinx_jax.checkpoints.mapping.vision import vision_mappings
from sphinx_jax.config import ClipConfig, ConvNextConfig, DinoConfig, QFormerConfig, VisionConfig
from sphinx_jax.vision.clip_vit import ClipViT
from sphinx_jax.vision.convnext import ConvNext
from sphinx_jax.vision.dinov2 import DinoV2
from sphinx_jax.vision.qformer import QFormer

torch = pytest.importorskip("torch", reason="the references are PyTorch models: install sphinx-jax[parity]")
transformers = pytest.importorskip("transformers", reason="the references are its models: install sphinx-jax[parity]")

ABSENT = {"clip": None, "convnext": None, "dino": None, "qformer": None}


def random_weights(model) -> dict[str, np.ndarray]:
    """Random values for every parameter, also for norms and layer scales, which libraries initialise to constants."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def run(encoder: type[nnx.Module], name: str, config, published: dict[str, np.ndarray], images: np.ndarray):
    """The output of our encoder with tensors under their published names, on images [batch, size, size, 3]."""
    graph, state = nnx.split(nnx.eval_shape(lambda: encoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), nnx.to_pure_dict(state))
    for mapping in vision_mappings(VisionConfig(**ABSENT | {name: config}), dim=8):
        if mapping.path[1] == name:
            array = params
            for key in mapping.path[2:]:
                array = array[key]
            array[mapping.index] = mapping.to_param(published[mapping.name])
    return jax.jit(lambda params, images: nnx.merge(graph, nnx.State(params))(images))(params, images)


def random_images(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def to_torch(images: np.ndarray):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def assert_close(ours, reference):
    reference = reference.detach().numpy()
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())


def rename(weights: dict[str, np.ndarray], prefix: str, *names: tuple[str, str]) -> dict[str, np.ndarray]:
    """The tensors under `prefix` + name, with each regular expression in `names` replaced in order."""
    renamed = {}
    for name, array in weights.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[prefix + name] = array
    return renamed


def test_convnext():
    config = ConvNextConfig(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), image_size=64)
    theirs = transformers.ConvNextModel(
        transformers.ConvNextConfig(depths=config.depths, hidden_sizes=config.dims, image_size=64)
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    published = rename(
        random_weights(theirs),
        "llma.openclip_convnext_xxl.",
        (r"^embeddings\.patch_embeddings", "stem.0"),
        (r"^embeddings\.layernorm", "stem.1"),
        (r"^layernorm", "head.norm"),
        (r"^encoder\.", ""),
        (r"downsampling_layer", "downsample"),
        (r"\.layers\.", ".blocks."),
        (r"layer_scale_parameter", "gamma"),
        (r"dwconv", "conv_dw"),
        (r"layernorm", "norm"),
        (r"pwconv", "mlp.fc"),
    )
    images = random_images(64)
    ours = run(ConvNext, "convnext", config, published, images)
    tokens = theirs(to_torch(images)).last_hidden_state.flatten(2).transpose(1, 2)
    # Their norm is of the mean over positions; ours is of each position.
    norm = torch.nn.functional.layer_norm(tokens, (32,), theirs.layernorm.weight, theirs.layernorm.bias, 1e-5)
    assert_close(ours[:, 1:], norm)
    assert_close(ours[:, 0], norm.mean(dim=1))


def test_convnext_of_timm():
    """The trunk of open_clip, with its own names."""
    timm = pytest.importorskip("timm.models.convnext", reason="the reference: install sphinx-jax[timm]")
    config = ConvNextConfig(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), image_size=64)
    theirs = timm.ConvNeXt(depths=config.depths, dims=config.dims, num_classes=0, norm_eps=1e-5)
    published = rename(random_weights(theirs), "llma.openclip_convnext_xxl.")
    images = random_images(64)
    ours = run(ConvNext, "convnext", config, published, images)
    tokens = theirs.head.norm(theirs.forward_features(to_torch(images))).flatten(2).transpose(1, 2)
    assert_close(ours[:, 1:], tokens)
    assert_close(ours[:, 0], tokens.mean(dim=1))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip(activation):
    config = ClipConfig(width=32, num_layers=2, num_heads=4, patch=8, image_size=32, activation=activation)
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8, hidden_act=activation,
        )
    )  # fmt: skip
    weights = {name.removeprefix("vision_model."): w for name, w in random_weights(theirs).items()}
    visual = "llma.clip.visual."
    published = {
        visual + "class_embedding": weights["embeddings.class_embedding"],
        visual + "positional_embedding": weights["embeddings.position_embedding.weight"],
        visual + "conv1.weight": weights["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        published[f"{visual}ln_pre.{kind}"] = weights[f"pre_layrnorm.{kind}"]
        published[f"{visual}ln_post.{kind}"] = weights[f"post_layernorm.{kind}"]
        for i in range(config.num_layers):
            layer, block = f"encoder.layers.{i}.", f"{visual}transformer.resblocks.{i}."
            qkv = [weights[f"{layer}self_attn.{which}_proj.{kind}"] for which in "qkv"]
            published[f"{block}attn.in_proj_{kind}"] = np.concatenate(qkv)
            published[f"{block}attn.out_proj.{kind}"] = weights[f"{layer}self_attn.out_proj.{kind}"]
            published[f"{block}ln_1.{kind}"] = weights[f"{layer}layer_norm1.{kind}"]
            published[f"{block}ln_2.{kind}"] = weights[f"{layer}layer_norm2.{kind}"]
            published[f"{block}mlp.c_fc.{kind}"] = weights[f"{layer}mlp.fc1.{kind}"]
            published[f"{block}mlp.c_proj.{kind}"] = weights[f"{layer}mlp.fc2.{kind}"]
    images = random_images(32)
    ours = run(ClipViT, "clip", config, published, images)
    tokens = theirs(to_torch(images)).last_hidden_state
    post = next(module for name, module in theirs.named_modules() if name.endswith("post_layernorm"))
    assert_close(ours, post(tokens))


def test_dinov2():
    """Without interpolation of the position embeddings, which the golden tests cover."""
    config = DinoConfig(width=48, num_layers=2, num_heads=4, patch=8, image_size=32, position_grid=4)
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, use_swiglu_ffn=True
        )
    )  # fmt: skip
    weights = random_weights(theirs)
    published = rename(
        weights,
        "llma.dinov2_vitg14.",
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^layernorm", "norm"),
        (r"^encoder\.layer\.", "blocks."),
        (r"layer_scale(.)\.lambda1", r"ls\1.gamma"),
        (r"attention\.o_proj", "attn.proj"),
        (r"mlp\.down_proj", "mlp.w3"),
    )
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            layer, block = f"encoder.layer.{i}.", f"llma.dinov2_vitg14.blocks.{i}."
            qkv = [weights[f"{layer}attention.{which}_proj.{kind}"] for which in "qkv"]
            gate_up = [weights[f"{layer}mlp.{which}_proj.{kind}"] for which in ("gate", "up")]
            published[f"{block}attn.qkv.{kind}"] = np.concatenate(qkv)
            published[f"{block}mlp.w12.{kind}"] = np.concatenate(gate_up)
    images = random_images(32)
    assert_close(run(DinoV2, "dino", config, published, images), theirs(to_torch(images)).last_hidden_state)


def test_qformer():
    config = QFormerConfig(
        vision_width=32, vision_layers=2, vision_heads=4, vision_mlp=80, patch=8, image_size=32,
        width=24, num_layers=4, num_heads=4, mlp=56, num_queries=6,
    )  # fmt: skip
    vit = transformers.Blip2VisionModel(
        transformers.Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )
    qformer = transformers.Blip2QFormerModel(
        transformers.Blip2QFormerConfig(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=56, encoder_hidden_size=32,
            cross_attention_frequency=2,
        )
    )  # fmt: skip
    queries = np.random.default_rng(1).normal(size=(1, 6, 24)).astype(np.float32)
    published = {"llma.qformer.query_tokens": queries}
    published |= {f"llma.qformer.vision_model.{name}": w for name, w in random_weights(vit).items()}
    published |= {f"llma.qformer.qformer.{name}": w for name, w in random_weights(qformer).items()}
    images = random_images(32)
    image_tokens = vit(to_torch(images)).last_hidden_state
    reference = qformer(query_embeds=torch.from_numpy(queries).expand(2, -1, -1), encoder_hidden_states=image_tokens)
    assert_close(run(QFormer, "qformer", config, published, images), reference.last_hidden_state)
