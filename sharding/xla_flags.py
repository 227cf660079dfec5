"""Options of XLA's GPU compiler that differ from its defaults, each with its reason.

They are passed with each compilation and not through XLA_FLAGS, where a name that the installed compiler does not know
aborts the process. Options in the user's XLA_FLAGS take precedence.
"""

import functools
import logging
import os
import re

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


def compiler_options(mesh: Mesh, slices_in_place: bool = False) -> Options:
    """The options for programs on `mesh`; none on a CPU."""
    return dict(SLICES_IN_PLACE) if slices_in_place and reads_slices_in_place(mesh.devices.flat[0]) else {}


def reads_slices_in_place(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether programs for `device`, compiled with SLICES_IN_PLACE, read a static slice of stacked matrices in place.

    A static slice is one whose index is a constant of the program.
    """
    if device.platform == "cpu" or getattr(device, "compute_capability", None) == "9.0":
        return False
    set_by_user = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return not SLICES_IN_PLACE.keys() & set_by_user and _fuses_slices(device)


@functools.cache
def _fuses_slices(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    """Whether the compiler for `device` fuses a slice into its product, found by compiling a small program."""
    replicated = NamedSharding(Mesh([device], "one"), PartitionSpec())
    args = (
        jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=replicated),
        jax.ShapeDtypeStruct((2, 128, 128), "bfloat16", sharding=replicated),
    )
    platform = "cuda" if device.platform in ("gpu", "cuda") else device.platform
    lowered = jax.jit(lambda x, stack: x @ stack[1]).trace(*args).lower(lowering_platforms=(platform,))
    try:
        text = lowered.compile(compiler_options=SLICES_IN_PLACE).as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        # jax 0.10.2 knows both options and fails to compile with them.
        log.info("the installed compiler cannot read slices in place: %s", error)
        return False
    return any(" slice(" in computation and "__cublas" in computation for computation in text.split("\n\n"))
