"""Options of XLA's GPU compiler: known ones are taken, unknown ones left out, the user's own left alone."""

import jax
import pytest

import sharding
from sharding import MeshShape, xla_options
from sharding.plan import find_gpu, has_gpu_compiler, planning_mesh

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture(scope="module")
def two_gpus():
    if not has_gpu_compiler():
        pytest.skip("needs jax's CUDA plugin, to compile for GPUs that are not there: pip install -e '.[plan]'")
    return planning_mesh(find_gpu("h100-80gb"), MeshShape(tensor=2))[0]


def test_an_option_that_the_compiler_does_not_know_is_left_out(two_gpus, monkeypatch):
    monkeypatch.setitem(xla_options.SEVERAL_GPUS, "xla_gpu_no_such_option", True)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert sharding.compiler_options(two_gpus) == {SCHEDULER: True}


def test_what_the_user_set_stays(two_gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{SCHEDULER}=false")
    assert sharding.compiler_options(two_gpus) == {}


def test_another_error_than_an_unknown_name_is_not_passed_over(two_gpus, monkeypatch):
    monkeypatch.setitem(xla_options.SEVERAL_GPUS, SCHEDULER, "neither yes nor no")
    with pytest.raises(jax.errors.JaxRuntimeError, match="neither yes nor no"):
        sharding.compiler_options(two_gpus)


def test_none_for_a_cpu():
    assert sharding.compiler_options(sharding.make_mesh(tensor=2)) == {}
