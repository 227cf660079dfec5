"""Options of XLA's GPU compiler that differ from its own choice: all of them, here, each with its reason.

They go with each compilation and not through XLA_FLAGS, where a name that the installed compiler does not know
aborts the process. What XLA_FLAGS does set is the user's, and stays.
"""

import functools
import logging
import os
import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

Options = dict[str, bool | int | str]

SEVERAL_GPUS: Options = {
    # Exchanges run beside the computation that does not need them. The compiler of jax 0.10.2 does it unasked (as many
    # exchanges, as many kernels beside them); asked for here, so that it does not hang on the version.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
"""For programs over more than one GPU.

Tried on a training step over fsdp 4 x tensor 8 and left as they are: combining exchanges up to 256 MiB (8 gathers
instead of 11, 3 scattered sums instead of 5, but less computation between start and end of each, 47 kernels instead of
53 and 24 instead of 34), and running two layers of a loop at once (as many in a round, the program longer). Command
buffers are XLA's default; a compiled program does not show them."""

SLICES_IN_PLACE: Options = {
    # A product whose matrix is a fixed slice of a stack is one kernel with the slice. Unasked from jax 0.11.2 on.
    "xla_gpu_enable_dynamic_slice_fusion": True,
    # Of the library's products only. XLA's own kernels, which it times against them, would get a copy of the slice.
    "xla_gpu_enable_triton_gemm": False,
}
"""For programs that ask for it (`Program.slices_in_place`), on GPUs that are no Hopper, if the compiler then does it.

Without them a mixture of experts copies each expert's matrices out of their stack before it reads a prompt. Programs
that do so move no byte less elsewhere with XLA's own kernels for products, whether in bfloat16, int8 or int4 (jax
0.11.2). On Hopper experts have kernels of their own."""


def compiler_options(mesh: Mesh, slices_in_place: bool = False) -> Options:
    """What programs for `mesh` are compiled with; nothing for a CPU."""
    device, options = mesh.devices.flat[0], {}
    if device.platform == "cpu":
        return options
    if mesh.size > 1:
        known = SEVERAL_GPUS.keys() - _named_by_user()
        options |= {name: SEVERAL_GPUS[name] for name in known if _is_known(name, SEVERAL_GPUS[name], device)}
    return options | (SLICES_IN_PLACE if slices_in_place and reads_slices_in_place(device) else {})


def reads_slices_in_place(device: jax.Device) -> bool:
    """Whether a product can read a matrix in place that is a slice of a stack, in programs for `device`.

    Only a slice that is fixed in the program, which has to be compiled with SLICES_IN_PLACE.
    """
    if device.platform == "cpu" or getattr(device, "compute_capability", None) == "9.0":
        return False
    return not SLICES_IN_PLACE.keys() & _named_by_user() and _fuses_slices(device)


def _named_by_user() -> set[str]:
    return set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))


@functools.cache
def _fuses_slices(device: jax.Device) -> bool:
    """Whether the compiler for `device` makes one kernel of a slice and its product: it compiles a small one."""
    lowered = _lowered(lambda x, stack: x @ stack[1], device, ((128, 128), (2, 128, 128)), "bfloat16")
    try:
        text = lowered.compile(compiler_options=SLICES_IN_PLACE).as_text()
    except jax.errors.JaxRuntimeError as error:
        # Of jax 0.10.2: it knows both options, and fails.
        log.info("the installed compiler cannot read slices in place: %s", error)
        return False
    return any(" slice(" in computation and "__cublas" in computation for computation in text.split("\n\n"))


@functools.cache
def _is_known(name: str, value: bool | int | str, device: jax.Device) -> bool:
    """Whether the compiler for `device` takes the option: it compiles next to nothing with it."""
    lowered = _lowered(lambda x: x, device, ((),), "float32")
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        log.info("the installed compiler has no option %s", name)
        return False
    return True


def _lowered(
    function: Callable[..., jax.Array], device: jax.Device, shapes: tuple[tuple[int, ...], ...], dtype: str
) -> jax.stages.Lowered:
    """`function` of arrays of such shapes on `device`, ready to be compiled."""
    whole = NamedSharding(Mesh([device], "one"), PartitionSpec())
    args = (jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape in shapes)
    platform = "cuda" if device.platform in ("gpu", "cuda") else device.platform
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
