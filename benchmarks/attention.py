"""Causal attention by itself on a CPU: ours, jax.nn.dot_product_attention and torch's, forwards and in its gradient.

python benchmarks/attention.py [--quick]

Needs the parity extra. float32; repetitions alternate, and a ratio is the other's median time over ours. Memory is
what each of jax's programs needs beside its arguments and results.
"""

import argparse
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jobs import rested

import sharding  # noqa: F401  sets jax up
from sphinx_jax.config import DecoderConfig, preset
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_mask import Causal

try:
    from peer import torch
except ImportError:
    sys.exit("error: this benchmark compares with torch; run pip install -e '.[parity]'")

SIZES = (("nano", 4, 256), ("nano", 4, 512), ("mixtral-140m", 1, 512), ("mixtral-140m", 1, 2048))

REPETITIONS = 7


def ours(q, k, v):
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    return attention(grouped, k, v, Causal()).reshape(q.shape)


def jaxs(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def torchs(q, k, v):
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)


def of_jax(function, arrays, with_gradient):
    """What to run, and MiB of its program."""
    *qkv, d_out = (jnp.asarray(x) for x in arrays)

    def gradients(*qkv):
        out, back = jax.vjp(function, *qkv)
        return out, back(d_out)

    compiled = jax.jit(gradients if with_gradient else function).lower(*qkv).compile()
    run = lambda: jax.block_until_ready(compiled(*qkv))
    return run, compiled.memory_analysis().temp_size_in_bytes / 2**20


def of_torch(arrays, with_gradient):
    *qkv, d_out = (torch.tensor(x) for x in arrays)
    for x in qkv:
        x.requires_grad_(with_gradient)

    def run():
        out = torchs(*qkv)
        return (out, torch.autograd.grad(out, qkv, d_out)) if with_gradient else out

    return run


def heads(config: DecoderConfig, rows: int, length: int) -> list[np.ndarray]:
    """q, k, v and a gradient of the output."""
    random = np.random.default_rng(0)
    draw = lambda heads: random.normal(size=(rows, length, heads, config.head_dim)).astype(np.float32)
    return [draw(n) for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition: whether it runs, not how fast")
    repetitions = 1 if parser.parse_args().quick else REPETITIONS
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| heads of | words | | ours, ms | of jax's | of torch's | ours, MiB | jax's, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, rows, length in SIZES:
        arrays = heads(preset(name).language, rows, length)
        for with_gradient in (False, True):
            (mine, memory), (jax_run, jax_memory) = (of_jax(f, arrays, with_gradient) for f in (ours, jaxs))
            runs = (mine, jax_run, of_torch(arrays, with_gradient))
            own, expected = (np.asarray(jax.tree.leaves(run())[0]) for run in (mine, jax_run))
            if np.abs(own - expected).max() > 1e-4:
                sys.exit(f"error: the two differ by {np.abs(own - expected).max():.1e}; nothing was timed")
            runs[-1]()
            times = [[rested(run) for run in runs] for _ in range(repetitions)]
            took, *others = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
            ratios = " | ".join(f"{other / took:.2f}" for other in others)
            what = "with its gradient" if with_gradient else "forwards"
            print(f"| {name} | {rows} x {length} | {what} | {took:.2f} | {ratios} | {memory:.1f} | {jax_memory:.1f} |")


if __name__ == "__main__":
    main()
