"""Plans at full size: the requirements of the original system, and smaller GPUs."""

import jax.numpy as jnp
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import inference as inference_module
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.jobs import compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import inference_meshes
from sphinx_jax.model import SphinxMoE

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

GIB = 2**30


def assert_fits(plan, num_gpus):
    assert plan.compiler == "gpu"
    assert plan.fits
    # 46.70 B language and 3.40 B vision parameters in bfloat16.
    assert sum(plan.parameters.values()) == pytest.approx(2 * 50_103_211_392 / num_gpus, rel=1e-3)
    assert plan.per_device["total_bytes"] < plan.gpu.pool_bytes < plan.gpu.memory_bytes


@pytest.mark.parametrize("gpu", ["rtx3090", "a10g", "rtx4080"])
def test_eight_small_gpus(inference, gpu):
    """The original needs 8 x 24 GB; sharded vision encoders make 8 x 16 GB enough."""
    plan = inference("sphinx-moe-1k", gpu, {"tensor": 8})
    assert_fits(plan, 8)


def test_two_large_gpus(needs_gpu_compiler, monkeypatch):
    """The original needs as many. A later chunk of a prompt needs as much memory as any other program, and is compiled
    alone: all of them take minutes.
    """

    def compile_one(jobs, mesh):
        return compile_jobs([job for job in jobs if job.name == "chunked prefill"], mesh)

    monkeypatch.setattr(inference_module, "compile_jobs", compile_one)
    config, shape = preset("sphinx-moe-1k"), MeshShape(tensor=2)
    plan = inference_plan(
        "sphinx-moe-1k", config, find_gpu("a100-80gb"), shape, dtype="bfloat16", max_num_seqs=1, max_model_len=4096
    )
    assert [program.name for program in plan.programs] == ["chunked prefill"]
    assert_fits(plan, 2)


def test_four_small_gpus_are_too_few():
    """The weights alone do not fit on 4 x 24 GB."""
    mesh, config = sharding.make_mesh(tensor=4), preset("sphinx-moe-1k")
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    needed = sharding.bytes_per_device(params)
    assert needed == pytest.approx(2 * 50_103_211_392 / 4, rel=1e-3)
    assert needed > find_gpu("rtx3090").pool_bytes


def test_decode_step_on_eight_gpus(inference):
    """Two all-reduces per layer, no all-gather or copy of weights, small temporaries."""
    plan = inference("sphinx-moe-1k", "rtx4080", {"tensor": 8})
    decode = next(program for program in plan.programs if program.name == "decode step")
    assert decode.memory.temporaries <= GIB // 2
    reduced = [c for c in decode.collectives if c.kind == "all-reduce"]
    assert [(c.axes, c.count, c.bytes) for c in reduced] == [(("tensor",), 2 * 32, 2 * 32 * 4096 * 2)]
    # The embedding of the sampled token and its logits, sharded by channel and by token id.
    gathered = [c for c in decode.collectives if c.kind != "all-reduce"]
    assert sum(c.bytes for c in gathered) <= 2 * (4096 + 32000)


@pytest.mark.parametrize(
    ("gpu", "quantize", "least_kept", "tokens_per_second"), [("rtx4080", None, 0, 1.0), ("rtx4090", "int4", 6.0, 15.0)]
)
def test_one_small_gpu(needs_gpu_compiler, monkeypatch, gpu, quantize, least_kept, tokens_per_second):
    """The original does not support this: experts in host memory, and those used last in device memory."""
    # The encoders take most of the time.
    monkeypatch.setattr(inference_module, "compile_jobs", lambda jobs, mesh: compile_jobs(jobs[1:], mesh))
    plan = inference_plan(
        "sphinx-moe-1k", preset("sphinx-moe-1k"), find_gpu(gpu), MeshShape(),
        dtype="bfloat16", quantize=quantize, offload=True, max_num_seqs=1, max_model_len=4096,
    )  # fmt: skip
    assert plan.compiler == "gpu"
    assert plan.fits
    weights = 3 * 4096 * 14336
    # A step and a zero point for 32 weights, and a scale for each output.
    expert = 2 * weights if quantize is None else weights // 2 + 2 * weights // 32 + 2 * (2 * 14336 + 4096)
    vision = 2 * (50_103_211_392 - 46_702_792_704)
    if quantize is None:
        assert plan.parameters["language"] == 2 * (46_702_792_704 - 256 * weights)
    assert (plan.parameters["experts"], plan.parameters["vision"]) == (2 * expert, vision)
    assert plan.offload
    kept = plan.offload["experts_kept"]
    assert kept >= least_kept * 32
    # The headroom, the encoders' place and that of two experts, less two experts and the images' embeddings.
    assert kept == (plan.headroom + vision - 2**28) // expert
    assert plan.offload["encoders_in_host_memory"]
    # The vectors before and after an image stay on the device.
    assert plan.host_pinned_bytes == 256 * expert + vision - 2 * 2 * 4096
    # Two experts a layer, of which kept / 256 are there; PCIe 4.
    seconds = 2 * 32 * (1 - kept / 256) * expert / 24e9
    assert plan.roofline["decode_seconds_per_token_at_least"] == pytest.approx(seconds)
    assert plan.roofline["decode_tokens_per_second_at_most"] > tokens_per_second


@pytest.mark.parametrize(
    ("gpu", "shape", "batch_size", "moments"),
    [
        ("a100-80gb", {"tensor": 8, "fsdp": 2}, 8, "float32"),
        ("h100-80gb", {"tensor": 8}, 4, "bfloat16"),
    ],
    ids=["16 x A100", "8 x H100, bfloat16 moments"],
)
def test_fine_tuning(training, gpu, shape, batch_size, moments):
    """The original trained on 32 x 80 GB and needs 16; 8 are enough with bfloat16 moments, which the plan notes."""
    plan = training(gpu, shape, batch_size, moments)
    assert plan.compiler == "gpu"
    assert plan.fits
    trainable = 46_702_792_704 / plan.num_gpus
    assert plan.optimizer == pytest.approx(trainable * (8 if moments == "float32" else 4), rel=0.01)
    assert plan.parameters["language"] == pytest.approx(4 * trainable, rel=0.01)
    assert plan.notes[0].endswith("float32." if moments == "float32" else "rounded to bfloat16 after every step.")
    kinds = {c.kind for c in plan.collectives if "fsdp" in c.axes}
    assert ("reduce-scatter" in kinds) == ("fsdp" in shape)


def test_default_mesh_is_tensor_parallel_first():
    config = preset("sphinx-moe-1k")
    assert inference_meshes(config, 8)[0] == MeshShape(tensor=8)
    assert inference_meshes(config, 32) == [MeshShape(tensor=8, expert=4), MeshShape(tensor=4, expert=8)]
