"""Load a synthetic checkpoint in the published layout: host memory, and throughput against sequential reads.

    python benchmarks/loading.py --gigabytes 4

The parameters have the published shapes except for the experts' hidden dimension, which --gigabytes determines.
Each rate is the best of --repeats, since the first load in a virtual machine also waits for memory of the host; the
files are dropped from the page cache before each. Host memory is the peak of the resident size, without the idle size
and without the arrays on the (CPU) devices, sampled every few milliseconds.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from sphinx_jax.checkpoints.formats import accessory
from sphinx_jax.checkpoints.formats.config_files import mistral_values
from sphinx_jax.checkpoints.io import torch_files
from sphinx_jax.checkpoints.mapping.language import language_mappings
from sphinx_jax.config import DecoderConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK_BYTES = 16 << 20


def sized_config(total_bytes: float, layers: int, dim: int, vocab: int) -> DecoderConfig:
    """Published shapes with a hidden dimension that makes the checkpoint about `total_bytes` in bfloat16."""
    heads = dim // 128
    published = DecoderConfig(dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=min(8, heads), vocab_size=vocab)
    rest = 2 * vocab * dim + layers * (2 * dim * dim + 2 * dim * published.num_kv_heads * published.head_dim)
    hidden = (total_bytes / 2 - rest) / (layers * published.num_experts * 3 * dim)
    if hidden < 128:
        raise SystemExit(f"error: {total_bytes:.3g} bytes are not enough for {layers} layers of width {dim}")
    return DecoderConfig(**{**vars(published), "hidden_dim": round(hidden / 128) * 128})


def write_synthetic(path: Path, config: DecoderConfig, shards: int) -> None:
    """An Accessory directory of random weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(mistral_values(config)))
    (path / "meta.json").write_text(json.dumps({"llama_type": "mixtral_sparse"}))
    mappings = language_mappings(config, "sparse", unstacked=True, prefix="llma.")
    shapes = {mapping.name: (mapping.shard_shape(shards), BFLOAT16) for mapping in mappings}
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(BFLOAT16)
    for i in range(shards):
        with torch_files.Writer(path / f"consolidated.{i:02d}-of-{shards:02d}.model.pth", shapes) as file:
            for name, (shape, _) in shapes.items():
                # Replicated tensors must be equal in all shards.
                shift = 0 if len(shape) == 1 or "gate" in name else i
                file.write(name, [np.resize(np.roll(noise, shift), shape)])


def drop_from_cache(path: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_read(path: Path) -> float:
    """Seconds of reading all files of a directory sequentially."""
    block = bytearray(BLOCK_BYTES)
    start = time.perf_counter()
    for file in sorted(path.glob("*.pth")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass
    return time.perf_counter() - start


class HostMemory:
    """Peak host memory of the process within the block, above that at entry and above device arrays."""

    def __enter__(self) -> "HostMemory":
        self.idle = _resident_bytes()
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            # Devices first: an array that arrives in between can only make the result larger.
            on_devices = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)
            self.peak = max(self.peak, _resident_bytes() - self.idle - on_devices)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(path: Path, unstacked: bool, dtype: str | None) -> tuple[float, int, int]:
    """Seconds of one load onto all devices, peak host memory, and bytes of the largest parameter."""
    with HostMemory() as memory:
        start = time.perf_counter()
        loaded = accessory.load(path, dtype=dtype, unstacked=unstacked)
        jax.block_until_ready(loaded.params)
        seconds = time.perf_counter() - start
    return seconds, memory.peak, max(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the checkpoint")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stacked", action="store_true", help="load the layers stacked, as for training")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="as stored by default")
    parser.add_argument("--directory", type=Path, help="directory for the files; temporary by default")
    options = parser.parse_args()

    config = sized_config(options.gigabytes * 1e9, options.layers, options.width, options.vocab)
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=options.directory))
    try:
        path = folder / "checkpoint"
        write_synthetic(path, config, options.shards)
        size = sum(file.stat().st_size for file in path.glob("*.pth"))
        print(f"{size / 1e9:.2f} GB in {options.shards} shards: {config}")
        jax.block_until_ready(jax.numpy.zeros(1))
        disk, load = [], []
        for _ in range(options.repeats):
            drop_from_cache(path)
            disk.append(sequential_read(path))
            drop_from_cache(path)
            load.append(measure(path, not options.stacked, options.dtype))
    finally:
        shutil.rmtree(folder)
    seconds = min(run[0] for run in load)
    peak, leaf = max(run[1] for run in load), load[0][2]
    print(f"disk, sequential: {size / min(disk) / 1e9:.2f} GB/s")
    print(f"load: {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, {min(disk) / seconds:.0%} of the disk's rate")
    print(
        f"host memory: {peak / 1e9:.2f} GB at its peak, {peak / leaf:.2f} of the largest parameter, {leaf / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
