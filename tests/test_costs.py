"""Operations against XLA's count of an unrolled program; bytes against explicit sums."""

import jax
import jax.numpy as jnp
import pytest

import sharding
from sphinx_jax.config import (
    ClipConfig,
    ConvNextConfig,
    DecoderConfig,
    DinoConfig,
    QFormerConfig,
    SphinxConfig,
    VisionConfig,
    preset,
)
from sphinx_jax.costs import Cost, Workload, decode_bytes, forward_flops, fraction_of_parameters
from sphinx_jax.kernels import attention, moe
from sphinx_jax.model import SphinxMoE, bind

pytestmark = pytest.mark.optimized

# XLA counts the body of a loop once: the decoder's layers are unstacked, and each encoder has one block per stack.
# Every token selects every expert, so that no count depends on the routing; and attention is dense.
CONFIG = SphinxConfig(
    DecoderConfig(256, 512, 2, num_heads=8, num_kv_heads=4, num_experts=2, experts_per_token=2, vocab_size=512),
    VisionConfig(
        image_size=128,
        clip=ClipConfig(128, 1, 8, 16, 128),
        convnext=ConvNextConfig((1, 1), (64, 128), 7, 64),
        dino=DinoConfig(128, 1, 8, 16, 128, 11),
        qformer=QFormerConfig(128, 1, 8, 256, 16, 128, 64, 2, 8, 128, 8, 2),
    ),
)
BATCH, TEXT = 4, 64


@pytest.mark.parametrize("shape", [{}, {"tensor": 2, "expert": 2, "fsdp": 2}], ids=str)
def test_flops_match_the_compilers(shape, monkeypatch):
    monkeypatch.setattr(moe, "choose_implementation", lambda *_: "dense")
    monkeypatch.setitem(attention._MAX_DENSE_SCORE_BYTES, "cpu", 1 << 30)
    mesh = sharding.make_mesh(**shape)
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh)

    def abstract(dims, dtype):
        names = ("batch", *[None] * (len(dims) - 1))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.named_sharding(names, dims, mesh))

    args = (params, abstract((BATCH, TEXT), jnp.int32), abstract((BATCH, 128, 128, 3), jnp.float32))
    forward = sharding.Program(lambda params, tokens, images: bind(graph, params)(tokens, images)[0])
    xla_flops = forward.compile(args, mesh).cost_analysis()["flops"]
    length = TEXT + CONFIG.num_image_tokens
    flops = forward_flops(CONFIG, params, mesh, Workload(BATCH, length, length, TEXT, BATCH))
    # XLA counts norms, activations and softmax too.
    assert 0.95 * xla_flops < sum(flops.values(), Cost(0.0, 0.0)).per_device_max < xla_flops


def test_decode_bytes():
    """Mixtral-8x7B, one sequence: two of eight experts, all other parameters but the embedding, and the KV cache."""
    config = preset("mixtral-8x7b")
    mesh = sharding.make_mesh(tensor=8)
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    read = decode_bytes(config, params, mesh, num_seqs=1, cache_len=4096)
    attention = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096
    layer = attention + 2 * 3 * 4096 * 14336 + 4096 * 8 + 2 * 4096
    weights = 32 * layer + 4096 + 4096 * 32000
    assert read.total == 2 * (weights + 2 * 32 * 4096 * 8 * 128)
    assert read.total / 8 <= read.per_device_max < 1.001 * read.total / 8
    # With many sequences every expert is read once.
    many = decode_bytes(config, params, mesh, num_seqs=64, cache_len=0).total
    assert many == pytest.approx(2 * (weights + 32 * 6 * 3 * 4096 * 14336), rel=1e-6)


@pytest.mark.parametrize("shape", [{"tensor": 2}, {"tensor": 4}, {"tensor": 8}], ids=str)
def test_fractions_per_device(shape):
    """With all four encoders. tests/memory_plan has 16 and 32 devices."""
    config, mesh = preset("sphinx-moe-1k"), sharding.make_mesh(**shape)
    params = sharding.abstract_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh)[1]
    assert fraction_of_parameters(params) <= 1.02 / mesh.size
    flops = sum(forward_flops(config, params, mesh, Workload(1, 4096, 4096, 1, 1)).values(), Cost(0.0, 0.0))
    assert flops.per_device_max <= 1.05 * flops.total / mesh.size
