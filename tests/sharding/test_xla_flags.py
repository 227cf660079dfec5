"""Options of XLA's GPU compiler: known ones are taken, unknown ones left out, the user's own left alone."""

import jax
import pytest

import sharding
from sharding import MeshShape, xla_flags
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler, planning_mesh

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture(scope="module")
def two_gpus():
    if not has_gpu_compiler():
        pytest.skip("needs jax's CUDA plugin, to compile for GPUs that are not there: pip install -e '.[plan]'")
    return planning_mesh(find_gpu("h100-80gb"), MeshShape(tensor=2))[0]


def test_an_option_that_the_compiler_does_not_know_is_left_out(two_gpus, monkeypatch):
    monkeypatch.setitem(xla_flags.SEVERAL_GPUS, "xla_gpu_no_such_option", True)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert sharding.compiler_options(two_gpus) == {SCHEDULER: True}


def test_what_the_user_set_stays(two_gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{SCHEDULER}=false")
    assert sharding.compiler_options(two_gpus) == {}


def test_another_error_than_an_unknown_name_is_not_passed_over(two_gpus, monkeypatch):
    monkeypatch.setitem(xla_flags.SEVERAL_GPUS, SCHEDULER, "neither yes nor no")
    with pytest.raises(jax.errors.JaxRuntimeError, match="neither yes nor no"):
        sharding.compiler_options(two_gpus)


def test_none_for_a_cpu():
    assert sharding.compiler_options(sharding.make_mesh(tensor=2)) == {}


@pytest.fixture
def an_a100(two_gpus, monkeypatch):
    """A card whose compiler, says the test, can read slices in place."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(xla_flags, "_fuses_slices", lambda device: True)
    return planning_mesh(find_gpu("a100-80gb"), MeshShape())[0]


def test_slices_are_read_in_place_by_programs_that_ask_for_it(an_a100):
    assert sharding.compiler_options(an_a100) == {}
    assert sharding.compiler_options(an_a100, slices_in_place=True) == xla_flags.SLICES_IN_PLACE
    with sharding.mesh_context(an_a100):
        assert not sharding.reads_slices_in_place()
    with sharding.mesh_context(an_a100, slices_in_place=True):
        assert sharding.reads_slices_in_place()


@pytest.mark.parametrize("name", xla_flags.SLICES_IN_PLACE)
def test_slices_are_not_read_in_place_where_the_user_chose_how_products_are_compiled(an_a100, monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=true")
    assert sharding.compiler_options(an_a100, slices_in_place=True) == {}
    with sharding.mesh_context(an_a100, slices_in_place=True):
        assert not sharding.reads_slices_in_place()


def test_a_hopper_gpu_has_kernels_of_its_own(an_a100, two_gpus):
    assert sharding.compiler_options(two_gpus, slices_in_place=True) == {SCHEDULER: True}


def test_a_compiler_that_fails_cannot(two_gpus, monkeypatch):
    """As that of jax 0.10.2 does, here with an option that none has."""
    monkeypatch.setitem(xla_flags.SLICES_IN_PLACE, "xla_gpu_no_such_option", True)
    assert not xla_flags._fuses_slices.__wrapped__(two_gpus.devices.flat[0])
