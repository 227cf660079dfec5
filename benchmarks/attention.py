"""Causal attention alone on a CPU, forward and backward: ours, jax.nn.dot_product_attention and torch's SDPA.

python benchmarks/attention.py [--quick]

Needs the parity extra. float32; repetitions alternate, and a ratio is the other's median time over ours. Memory is
the temporaries of each jax program.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jobs import time_after_idle

import sharding  # noqa: F401  configures jax
from sphinx_jax.config import DecoderConfig, preset
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.memory_plan.aot import memory_analysis

try:
    from peer import torch
except ImportError:
    sys.exit("error: this benchmark compares with torch; run pip install -e '.[parity]'")

SIZES = (("nano", 4, 256), ("nano", 4, 512), ("mixtral-140m", 1, 512), ("mixtral-140m", 1, 2048))

REPETITIONS = 7


def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    return attention(grouped, k, v, Causal()).reshape(q.shape)


def jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def torch_sdpa(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def jax_run(function: Callable, arrays: list[np.ndarray], backward: bool) -> tuple[Callable[[], Any], float]:
    """A run to time, and the temporaries of its program in MiB."""
    *qkv, d_out = (jnp.asarray(x) for x in arrays)

    def forward_backward(*qkv: jax.Array) -> tuple:
        out, vjp = jax.vjp(function, *qkv)
        return out, vjp(d_out)

    compiled = jax.jit(forward_backward if backward else function).lower(*qkv).compile()
    return lambda: jax.block_until_ready(compiled(*qkv)), memory_analysis(compiled).temporaries / 2**20


def torch_run(arrays: list[np.ndarray], backward: bool) -> Callable[[], Any]:
    """A run to time."""
    *qkv, d_out = (torch.tensor(x) for x in arrays)
    for x in qkv:
        x.requires_grad_(backward)

    def run() -> Any:
        out = torch_sdpa(*qkv)
        return (out, torch.autograd.grad(out, qkv, d_out)) if backward else out

    return run


def random_heads(config: DecoderConfig, batch_size: int, length: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the output: [batch, length, heads, head_dim]."""
    random = np.random.default_rng(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    return [random.normal(size=(batch_size, length, n, config.head_dim)).astype(np.float32) for n in heads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition: a smoke test")
    repetitions = 1 if parser.parse_args().quick else REPETITIONS
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| heads of | batch x tokens | pass | ours, ms | jax / ours | torch / ours | ours, MiB | jax, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, batch_size, length in SIZES:
        arrays = random_heads(preset(name).language, batch_size, length)
        for backward in (False, True):
            (our_run, our_memory), (nn_run, nn_memory) = (jax_run(f, arrays, backward) for f in (ours, jax_nn))
            runs = (our_run, nn_run, torch_run(arrays, backward))
            actual, expected = (np.asarray(jax.tree.leaves(run())[0]) for run in (our_run, nn_run))
            if (difference := np.abs(actual - expected).max()) > 1e-4:
                sys.exit(f"error: the outputs differ by {difference:.1e}; nothing was timed")
            runs[-1]()
            times = [[time_after_idle(run) for run in runs] for _ in range(repetitions)]
            milliseconds, *others = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
            ratios = " | ".join(f"{other / milliseconds:.2f}" for other in others)
            cells = (
                name,
                f"{batch_size} x {length}",
                "forward and backward" if backward else "forward",
                f"{milliseconds:.2f}",
                ratios,
                f"{our_memory:.1f}",
                f"{nn_memory:.1f}",
            )
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
