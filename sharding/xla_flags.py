"""Options of XLA's GPU compiler that differ from its defaults, each with its reason.

They are passed with each compilation and not through XLA_FLAGS, where a name that the installed compiler does not know
aborts the process. Options in the user's XLA_FLAGS take precedence.
"""

import functools
import logging
import os
import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

Options = dict[str, bool | str]

SLICES_IN_PLACE: Options = {
    # Fuses a static slice of a stacked array into the matrix product that reads it. Default from jax 0.11.2 on.
    "xla_gpu_enable_dynamic_slice_fusion": True,
    # The fusion covers cuBLAS products only. A Triton product, which autotuning may prefer, would copy the slice.
    "xla_gpu_enable_triton_gemm": False,
}
"""For programs with `Program.slices_in_place`, on non-Hopper GPUs, if the installed compiler supports it.

Without these options a mixture of experts copies each expert's matrices out of their stack before every prefill. Triton
products save no bytes elsewhere in these programs, in bfloat16, int8 or int4 (jax 0.11.2). On Hopper the experts have
their own kernels.
"""

FUSED_OPERANDS: Options = {
    # Fuses what computes an operand, such as the conversion of integers, into the matrix product. Default.
    "xla_gpu_enable_triton_gemm": True,
    # Autotuning may otherwise prefer a cuBLAS product, and the operand is written to memory first.
    "xla_gpu_cublas_fallback": False,
}
"""For programs with `Program.fused_operands`, on GPUs."""

FUSED_GROUPS: Options = {
    # Fuses the broadcast of a number of each group of the contracted dimension, such as a step of int4.
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
    # Without it int4 operands can abort the compiler (jax 0.10.2, triton_tiling_propagation.cc:524).
    "xla_gpu_experimental_gemm_fusion_v2": True,
    # A product that is split along the contracted dimension would write what is broadcast.
    "xla_gpu_experimental_force_split_k": "1",
}
"""For the same programs with `Program.fused_groups`, if the installed compiler fuses with them.

Such programs were compiled for absent GPUs and not run on one. Any of these options in XLA_FLAGS turns all of them off.
"""

OVERLAP_COLLECTIVES: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""For programs with `Program.overlap_collectives`, on several GPUs.

By default XLA waits for each collective of a training step as soon as it has begun (jax 0.10.2, read off the compiled
program); this scheduler moves other work in between, for 3 to 5 % more temporaries.
"""


def compiler_options(
    mesh: Mesh,
    slices_in_place: bool = False,
    overlap_collectives: bool = False,
    fused_operands: bool = False,
    fused_groups: bool = False,
) -> Options:
    """The options for programs on `mesh`; none on a CPU."""
    device = mesh.devices.flat[0]
    options: Options = {}
    if slices_in_place and reads_slices_in_place(device):
        options |= SLICES_IN_PLACE
    if overlap_collectives and mesh.size > 1 and device.platform != "cpu" and not _set_by_user(OVERLAP_COLLECTIVES):
        options |= OVERLAP_COLLECTIVES
    if fused_operands and fuses_operands(device):
        options |= FUSED_OPERANDS
    if fused_groups and fuses_groups(device):
        options |= FUSED_GROUPS
    return options


def fuses_operands(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether programs for `device`, compiled with FUSED_OPERANDS, compute an operand in the product that reads it."""
    return device.platform != "cpu" and not _set_by_user(FUSED_OPERANDS)


def fuses_groups(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether they, compiled with FUSED_GROUPS, do so from numbers of groups along the contracted dimension too."""
    return fuses_operands(device) and not _set_by_user(FUSED_GROUPS) and _fuses_broadcasts(device)


def reads_slices_in_place(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether programs for `device`, compiled with SLICES_IN_PLACE, read a static slice of stacked matrices in place.

    A static slice is one whose index is a constant of the program.
    """
    if device.platform == "cpu" or getattr(device, "compute_capability", None) == "9.0":
        return False
    return not _set_by_user(SLICES_IN_PLACE) and _fuses_slices(device)


def _set_by_user(options: Options) -> bool:
    """Whether XLA_FLAGS has any of the options."""
    return bool(options.keys() & set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))))


@functools.cache
def _fuses_slices(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether the compiler for `device` fuses a slice into its product, found by compiling a small program."""
    args = ((128, 128), "bfloat16"), ((2, 128, 128), "bfloat16")
    text = _compiled_text(device, lambda x, stack: x @ stack[1], args, SLICES_IN_PLACE)
    return any(" slice(" in computation and "__cublas" in computation for computation in text.split("\n\n"))


@functools.cache
def _fuses_broadcasts(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether the compiler for `device` fuses a number of each group into a product, found in the same way."""

    def function(x: jax.Array, groups: jax.Array, factors: jax.Array) -> jax.Array:
        weights = groups.astype(x.dtype) * factors[:, None].astype(x.dtype)
        return x @ weights.reshape(-1, groups.shape[2])

    args = ((16, 1024), "bfloat16"), ((32, 32, 512), "int8"), ((32, 512), "int8")
    text = _compiled_text(device, function, args, FUSED_OPERANDS | FUSED_GROUPS)
    return any(" broadcast(" in computation and " dot(" in computation for computation in text.split("\n\n"))


def _compiled_text(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    function: Callable[..., jax.Array],
    args: tuple[tuple[tuple[int, ...], str], ...],
    options: Options,
) -> str:
    """`function` of `args`, shapes and dtypes, compiled for `device`; empty if the compiler fails with `options`."""
    replicated = NamedSharding(Mesh([device], "one"), PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(*arg, sharding=replicated) for arg in args]
    platform = "cuda" if device.platform in ("gpu", "cuda") else device.platform
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))
    try:
        return lowered.compile(compiler_options=options).as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        # jax 0.10.2 knows the options of SLICES_IN_PLACE and fails to compile with them.
        log.info("the installed compiler fails with %s: %s", ", ".join(options), error)
        return ""
