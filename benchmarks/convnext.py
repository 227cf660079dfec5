"""A ConvNeXt block's 7 x 7 convolution and norm on a CPU: ours, XLA's grouped convolution, and torch.

python benchmarks/convnext.py [--quick]

Needs the parity extra. float32, one image at the four resolutions of ConvNeXt-XXL; repetitions alternate, and a ratio
is the other's median time over ours.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jobs import time_after_idle

import sharding  # noqa: F401  configures jax
from sphinx_jax.config import ConvNextConfig
from sphinx_jax.kernels.depthwise import depthwise_conv

try:
    from peer import torch
except ImportError:
    sys.exit("error: this benchmark compares with torch; run pip install -e '.[parity]'")

CONFIG = ConvNextConfig()
EPS = 1e-6
REPETITIONS = 7


def grouped_conv(x: jax.Array, w: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w[:, :, None], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


def jax_run(conv: Callable[[jax.Array, jax.Array], jax.Array], *arrays: np.ndarray) -> Callable[[], jax.Array]:
    def convolved_and_normed(x: jax.Array, w: jax.Array) -> jax.Array:
        y = conv(x, w)
        centred = y - jnp.mean(y, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS)

    x, w = map(jnp.asarray, arrays)
    compiled = jax.jit(convolved_and_normed).lower(x, w).compile()
    return lambda: jax.block_until_ready(compiled(x, w))


def torch_run(x: np.ndarray, w: np.ndarray) -> Callable[[], "torch.Tensor"]:
    channels, functional = x.shape[-1], torch.nn.functional
    # Channels are the last dimension in memory, as in its own ConvNeXt.
    images = torch.tensor(x).permute(0, 3, 1, 2)
    filters = torch.tensor(w).permute(2, 0, 1)[:, None].contiguous()

    @torch.inference_mode()
    def run() -> "torch.Tensor":
        convolved = functional.conv2d(images, filters, padding=w.shape[0] // 2, groups=channels)
        return functional.layer_norm(convolved.permute(0, 2, 3, 1), (channels,), eps=EPS)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition: a smoke test")
    repetitions = 1 if parser.parse_args().quick else REPETITIONS
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| channels | feature map | ours, ms | grouped / ours | torch / ours |")
    print("| --- | --- | --- | --- | --- |")
    random = np.random.default_rng(0)
    for stage, dim in enumerate(CONFIG.dims):
        side = CONFIG.image_size // 4 // 2**stage
        x = random.normal(size=(1, side, side, dim)).astype(np.float32)
        w = random.normal(size=(CONFIG.kernel, CONFIG.kernel, dim)).astype(np.float32)
        runs = [jax_run(depthwise_conv, x, w), jax_run(grouped_conv, x, w), torch_run(x, w)]
        outputs = [np.asarray(run()) for run in runs]
        if (difference := max(np.abs(outputs[0] - other).max() for other in outputs[1:])) > 1e-4:
            sys.exit(f"error: the outputs differ by {difference:.1e}; nothing was timed")
        times = [[time_after_idle(run) for run in runs] for _ in range(repetitions)]
        ours, *others = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
        ratios = " | ".join(f"{other / ours:.2f}" for other in others)
        print(f"| {dim:,} | {side} x {side} | {ours:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
