"""What fits where, at full size: the original system's own requirements, and less."""

import pytest

from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import inference as planned
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.jobs import compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import inference_meshes

pytestmark = pytest.mark.slow

GIB = 2**30


@pytest.mark.parametrize(("card", "tensor"), [("a100-80gb", 2), ("rtx3090", 8), ("a10g", 8), ("rtx4080", 8)])
def test_answering(inference, card, tensor):
    """The original needs 2 x 80 GB or 8 x 24 GB; 8 x 16 GB takes encoders that are sharded too."""
    plan = inference("sphinx-moe-1k", card, {"tensor": tensor})
    assert plan.compiler == "gpu"
    assert plan.fits
    # 46.70 B parameters of language and 3.40 B of vision, two bytes each.
    assert sum(plan.parameters.values()) == pytest.approx(2 * 50_103_211_392 / tensor, rel=1e-3)
    assert plan.sharded_map["total_bytes"] < plan.gpu.memory_bytes


def test_four_small_cards_are_too_few(needs_gpu_compiler, monkeypatch):
    """Decoding alone, which takes the least of the four programs, does not fit on 4 x 24 GB: the others need not be
    compiled to know."""
    monkeypatch.setattr(planned, "compile_jobs", lambda jobs, mesh: compile_jobs(jobs[-1:], mesh))
    card, config = find_gpu("rtx3090"), preset("sphinx-moe-1k")
    size = {"dtype": "bfloat16", "max_num_seqs": 1, "max_model_len": 4096}
    plan = inference_plan("sphinx-moe-1k", config, card, MeshShape(tensor=4), **size)
    assert [program.name for program in plan.programs] == ["decode one token"]
    assert sum(plan.parameters.values()) == pytest.approx(2 * 50_103_211_392 / 4, rel=1e-3)
    assert not plan.fits
    assert plan.sharded_map["total_bytes"] > plan.gpu.memory_bytes


def test_decoding_on_eight_cards(inference):
    """Two reductions a layer, no weights gathered or copied, next to no temporaries."""
    plan = inference("sphinx-moe-1k", "rtx4080", {"tensor": 8})
    decode = next(program for program in plan.programs if program.name == "decode one token")
    assert decode.memory.temporaries <= GIB // 2
    reduced = [c for c in decode.collectives if c.kind == "all-reduce"]
    assert [(c.axes, c.count, c.bytes) for c in reduced] == [(("tensor",), 2 * 32, 2 * 32 * 4096 * 2)]
    # The chosen token's embedding and its scores, which are split by channel and by word.
    gathered = [c for c in decode.collectives if c.kind != "all-reduce"]
    assert sum(c.bytes for c in gathered) <= 2 * (4096 + 32000)


def test_one_small_card(needs_gpu_compiler):
    """The original told its users that this could not be: layers in host memory, two of them on the card."""
    card, config = find_gpu("rtx4080"), preset("sphinx-moe-1k")
    plan = inference_plan(
        "sphinx-moe-1k", config, card, MeshShape(), dtype="bfloat16", offload=True, max_num_seqs=1, max_model_len=4096
    )
    assert plan.compiler == "gpu"
    assert plan.fits
    layer = (46_702_792_704 - 2 * 32_000 * 4096 - 4096) // 32
    assert plan.parameters["language"] == 2 * (2 * layer + 2 * 32_000 * 4096 + 4096)
    # All of the layers cross a bus of 31.5e9 bytes a second for each token.
    assert plan.roofline["decode_seconds_per_token_at_least"] == pytest.approx(2 * 32 * layer / 31.5e9)


@pytest.mark.parametrize(
    ("card", "shape", "batch", "moments"),
    [
        ("a100-80gb", {"tensor": 8, "fsdp": 4}, 16, "float32"),
        ("a100-80gb", {"tensor": 8, "fsdp": 2}, 8, "float32"),
        ("h100-80gb", {"tensor": 8}, 4, "bfloat16"),
    ],
    ids=["32 x A100", "16 x A100", "8 x H100, narrow moments"],
)
def test_fine_tuning(training, card, shape, batch, moments):
    """The original trained on 32 x 80 GB and needs 16; 8 do with moments in bfloat16, which the plan says."""
    plan = training(card, shape, batch, moments)
    assert plan.compiler == "gpu"
    assert plan.fits
    has_loss = 46_702_792_704 / plan.num_gpus
    assert plan.optimizer == pytest.approx(has_loss * (8 if moments == "float32" else 4), rel=0.01)
    assert plan.parameters["language"] == pytest.approx(4 * has_loss, rel=0.01)
    assert plan.notes[0].endswith("float32." if moments == "float32" else "rounded to bfloat16 after every step.")
    kinds = {c.kind for c in plan.collectives if "fsdp" in c.axes}
    assert ("reduce-scatter" in kinds) == ("fsdp" in shape)


def test_the_default_mesh_is_the_most_tensor_parallel():
    config = preset("sphinx-moe-1k")
    assert inference_meshes(config, 8)[0] == MeshShape(tensor=8)
    assert inference_meshes(config, 32) == [MeshShape(tensor=8, expert=4), MeshShape(tensor=4, expert=8)]
