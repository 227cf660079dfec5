"""Communication by mesh axes: worked examples, and the bytes of a compiled program counted hop by hop."""

import dataclasses
import json
import re

import pytest

from sharding import MeshShape
from sphinx_jax.cli import plan, train
from sphinx_jax.config import PRESETS, DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.hlo import Collective, collectives
from sphinx_jax.memory_plan.network import Communication, communication
from sphinx_jax.memory_plan.training import training_plan
from tests.instruments.cross_host import bytes_out_of_a_host
from tests.memory_plan.test_collectives import step_program

pytestmark = pytest.mark.optimized

CONFIG = SphinxConfig(DecoderConfig(256, 512, 2, num_heads=8, num_kv_heads=8, vocab_size=512), None)
MESH = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 4}
FACTORS = {"all-gather": 3 / 4, "reduce-scatter": 3 / 4, "all-reduce": 6 / 4}


@pytest.mark.parametrize(("kind", "factor"), FACTORS.items())
def test_rings(kind, factor):
    """16 devices on two hosts: groups of neighbours stay on a host; of four other groups each ring leaves it once."""
    (row,) = communication([Collective(kind, ("tensor",), 3, 1200)], MESH, 8, 100.0)
    assert row == Communication(("tensor",), int(1200 * factor), 0, 1200 * factor / 100)
    (row,) = communication([Collective(kind, ("fsdp",), 3, 1200)], MESH, 8, 100.0)
    assert row == Communication(("fsdp",), int(1200 * factor), int(4 * 1200 * factor), 4 * 1200 * factor / 50e9)


def test_all_to_all():
    """Each of a host's two members sends a quarter of its bytes to each of the two devices of the other host."""
    (row,) = communication([Collective("all-to-all", ("fsdp",), 1, 1200)], MESH, 8, 100.0)
    assert (row.sent_bytes, row.cross_host_bytes) == (900, 4 * 2 * 2 * 300)


def test_the_longest_first_and_by_axes():
    found = [Collective("all-gather", ("tensor",), 1, 800), Collective("all-reduce", ("fsdp", "tensor"), 1, 1600)]
    rows = communication([*found, found[0]], MESH, 8, 1e15)
    assert [row.axes for row in rows] == [("fsdp", "tensor"), ("tensor",)]
    assert [row.sent_bytes for row in rows] == [3000, 1200]
    assert [row.cross_host_bytes for row in rows] == [3000, 0]


@pytest.fixture(scope="module")
def program_text(needs_gpu_compiler):
    """The text of a training step on 16 absent GPUs, and its collectives."""
    text, program = step_program(CONFIG, MeshShape(fsdp=4, tensor=4))
    return text, collectives(text, program.mesh)


@pytest.mark.parametrize("gpus_per_host", [8, 4, 2, 16])
def test_bytes_out_of_a_host_are_those_of_the_compiled_program(program_text, gpus_per_host):
    text, found = program_text
    rows = communication(found, MESH, gpus_per_host, find_gpu("a100-80gb").link_bandwidth)
    counted = bytes_out_of_a_host(text, gpus_per_host)
    assert sum(row.cross_host_bytes for row in rows) == pytest.approx(counted, rel=1e-6)
    assert (counted > 0) == (gpus_per_host < 16)
    # Tensor parallelism leaves a host only where it has fewer GPUs than that axis.
    (tensor,) = (row for row in rows if row.axes == ("tensor",))
    assert (tensor.cross_host_bytes > 0) == (gpus_per_host < 4)


@pytest.mark.slow
def test_report(monkeypatch, capsys, needs_gpu_compiler):
    monkeypatch.setitem(PRESETS, "small", lambda: CONFIG)
    planned = []

    def plan_once(*args):
        planned[:] = planned or [training_plan(*args)]
        return planned[0]

    # Both reports are of the same plan.
    monkeypatch.setattr(plan, "training_plan", plan_once)
    argv = ["--plan", "--preset", "small", "--data", "x.yaml", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv += ["--max-length", "64", "--batch-size", "4", "--gpu", "a100-80gb", "--dtype", "bfloat16"]
    assert train.main([*argv, "--gpus-per-host", "2"]) == 0
    out = capsys.readouterr().out
    assert "300 GB/s a GPU over NVLink, 400 Gb/s a host of 2 GPUs over the network" in " ".join(out.split())
    assert re.search(r"^fsdp +network +[\d.,]+ +[\d.,]+ +\S+ *$", out, re.M)
    assert re.search(r"^tensor +NVLink +[\d.,]+ +0\.00 +\S+ *$", out, re.M)
    assert train.main([*argv, "--json"]) == 0
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["gpus_per_host"] == 8 and network["gbit_s_per_host"] == 400
    assert {tuple(row) for row in network["axes"]} == {tuple(f.name for f in dataclasses.fields(Communication))}
    assert all(row["cross_host_bytes"] == 0 for row in network["axes"])
    assert network["seconds_at_least"] == pytest.approx(sum(row["seconds"] for row in network["axes"]))
    assert network["seconds_at_least"] > 0
