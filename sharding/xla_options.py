"""Options of XLA's GPU compiler that differ from its own choice: all of them, here, each with its reason.

They go with each compilation and not through XLA_FLAGS, where a name that the installed compiler does not know
aborts the process. What XLA_FLAGS does set is the user's, and stays.
"""

import functools
import logging
import os
import re

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


def compiler_options(mesh: Mesh) -> Options:
    """What programs for `mesh` are compiled with; nothing for a CPU."""
    if mesh.devices.flat[0].platform == "cpu" or mesh.size == 1:
        return {}
    named = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    device = mesh.devices.flat[0]
    return {name: value for name, value in SEVERAL_GPUS.items() if name not in named and _is_known(name, value, device)}


@functools.cache
def _is_known(name: str, value: bool | int | str, device: jax.Device) -> bool:
    """Whether the compiler for `device` takes the option: it compiles next to nothing with it."""
    x = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(Mesh([device], "one"), PartitionSpec()))
    platform = "cuda" if device.platform in ("gpu", "cuda") else device.platform
    lowered = jax.jit(lambda x: x).trace(x).lower(lowering_platforms=(platform,))
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        log.info("the installed compiler has no option %s", name)
        return False
    return True
