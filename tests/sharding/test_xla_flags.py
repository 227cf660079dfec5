"""Options of XLA's GPU compiler: when they are passed, and when the user's XLA_FLAGS take precedence."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sharding
from sharding import MeshShape, xla_flags
from sphinx_jax.hardware import find_gpu
from sphinx_jax.kernels.linear import dot
from sphinx_jax.kernels.quantized import quantize
from sphinx_jax.memory_plan.aot import has_gpu_compiler, planning_mesh


@pytest.fixture(scope="module")
def hopper_mesh():
    if not has_gpu_compiler():
        pytest.skip("needs jax's CUDA plugin, to compile for absent GPUs: pip install -e '.[plan]'")
    return planning_mesh(find_gpu("h100-80gb"), MeshShape(tensor=2))[0]


@pytest.fixture
def a100_mesh(hopper_mesh, monkeypatch):
    """One A100, whose compiler is taken to read slices in place."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(xla_flags, "_fuses_slices", lambda device: True)
    return planning_mesh(find_gpu("a100-80gb"), MeshShape())[0]


def test_no_options_on_cpu():
    assert sharding.compiler_options(sharding.make_mesh(tensor=2), slices_in_place=True) == {}


def test_slices_in_place_is_opt_in(a100_mesh):
    assert sharding.compiler_options(a100_mesh) == {}
    assert sharding.compiler_options(a100_mesh, slices_in_place=True) == xla_flags.SLICES_IN_PLACE
    with sharding.mesh_context(a100_mesh):
        assert not sharding.reads_slices_in_place()
    with sharding.mesh_context(a100_mesh, slices_in_place=True):
        assert sharding.reads_slices_in_place()


@pytest.mark.parametrize("name", xla_flags.SLICES_IN_PLACE)
def test_xla_flags_of_the_user_take_precedence(a100_mesh, monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=true")
    assert sharding.compiler_options(a100_mesh, slices_in_place=True) == {}
    with sharding.mesh_context(a100_mesh, slices_in_place=True):
        assert not sharding.reads_slices_in_place()


def test_no_options_on_hopper(a100_mesh, hopper_mesh):
    assert sharding.compiler_options(hopper_mesh, slices_in_place=True) == {}


def test_collectives_overlap_on_several_gpus(hopper_mesh, a100_mesh, monkeypatch):
    """Not on one GPU, nor on CPUs, nor against the user's XLA_FLAGS."""
    (option,) = xla_flags.OVERLAP_COLLECTIVES
    assert sharding.compiler_options(hopper_mesh, overlap_collectives=True) == {option: True}
    assert sharding.compiler_options(hopper_mesh) == {}
    for mesh in (a100_mesh, sharding.make_mesh(tensor=2)):
        assert sharding.compiler_options(mesh, overlap_collectives=True) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{option}=false")
    assert sharding.compiler_options(hopper_mesh, overlap_collectives=True) == {}


def test_failing_compiler_does_not_read_slices_in_place(hopper_mesh, monkeypatch):
    """jax 0.10.2's compiler fails with these options; here any compiler does, with an unknown one."""
    monkeypatch.setitem(xla_flags.SLICES_IN_PLACE, "xla_gpu_no_such_option", True)
    assert not xla_flags._fuses_slices.__wrapped__(hopper_mesh.devices.flat[0])


def test_fused_operands(a100_mesh, hopper_mesh, monkeypatch):
    for mesh in (a100_mesh, hopper_mesh):
        assert sharding.compiler_options(mesh, fused_operands=True) == xla_flags.FUSED_OPERANDS
        with sharding.mesh_context(mesh, fused_operands=True):
            assert sharding.fuses_operands()
        with sharding.mesh_context(mesh):
            assert not sharding.fuses_operands()
    assert sharding.compiler_options(sharding.make_mesh(), fused_operands=True) == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    assert sharding.compiler_options(a100_mesh, fused_operands=True) == {}
    with sharding.mesh_context(a100_mesh, fused_operands=True):
        assert not sharding.fuses_operands()


GROUPS = {"fused_operands": True, "fused_groups": True}


def test_fused_groups(a100_mesh, hopper_mesh, monkeypatch):
    """Where the compiler fuses them, as the installed one does; not with an option that it does not know."""
    for mesh in (a100_mesh, hopper_mesh):
        assert sharding.compiler_options(mesh, **GROUPS) == xla_flags.FUSED_OPERANDS | xla_flags.FUSED_GROUPS
        with sharding.mesh_context(mesh, **GROUPS):
            assert sharding.fuses_groups()
        with sharding.mesh_context(mesh, fused_operands=True):
            assert not sharding.fuses_groups()
    device = a100_mesh.devices.flat[0]
    monkeypatch.setitem(xla_flags.FUSED_GROUPS, "xla_gpu_experimental_gemm_fusion_v2", False)
    monkeypatch.setitem(xla_flags.FUSED_GROUPS, "xla_gpu_experimental_enable_subchannel_dequantisation_fusion", False)
    assert not xla_flags._fuses_broadcasts.__wrapped__(device)
    monkeypatch.setitem(xla_flags.FUSED_GROUPS, "xla_gpu_no_such_option", True)
    assert not xla_flags._fuses_broadcasts.__wrapped__(device)


@pytest.mark.parametrize("name", xla_flags.FUSED_GROUPS)
def test_users_xla_flags_turn_fused_groups_off(a100_mesh, monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=0")
    assert sharding.compiler_options(a100_mesh, **GROUPS) == xla_flags.FUSED_OPERANDS


def test_a_program_that_cannot_fuse_groups_is_compiled_without(a100_mesh, monkeypatch, caplog):
    """As with an option that fails for this program alone. Products fused with groups have operands of int4."""
    monkeypatch.setattr(xla_flags, "_fuses_broadcasts", lambda device: True)
    replicated = NamedSharding(a100_mesh, PartitionSpec())
    w = jax.eval_shape(lambda: quantize(jnp.zeros((1024, 512)), "int4", -2))
    args = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated),
        (jax.ShapeDtypeStruct((16, 1024), "bfloat16"), w),
    )
    program = sharding.Program(lambda x, w: dot(x, w), fused_operands=True)
    assert "s4[" in program.compile(args, a100_mesh, "cuda").as_text()
    monkeypatch.setitem(xla_flags.FUSED_GROUPS, "xla_gpu_no_such_option", True)
    assert "s4[" not in program.compile(args, a100_mesh, "cuda").as_text()
    assert "xla_gpu_no_such_option" in caplog.text
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        program._replace(fused_operands=False).compile(args, a100_mesh, "cuda", {"xla_gpu_no_such_option": True})
