"""Converting needs host memory for the largest parameter, not for the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.checkpoints.io import safetensors_files

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]

DIM, HIDDEN, LAYERS, EXPERTS = 512, 8192, 2, 8
LARGEST = EXPERTS * 2 * DIM * HIDDEN * 2
"""Bytes of the gate and up projections of a layer's experts, one parameter."""

CONVERT = """
import os, sys, threading
from sphinx_jax import checkpoints

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) << 10

small, source, out, format = sys.argv[1:]
checkpoints.convert(small, out + ".small", format)
baseline = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
checkpoints.convert(source, out, format)
done.set()
thread.join()
print(peak - baseline)
"""


def write_mixtral(path: Path, dim: int, hidden: int) -> Path:
    """A Hugging Face directory of random weights in bfloat16."""
    path.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (64, dim), "model.norm.weight": (dim,), "lm_head.weight": (64, dim)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        for e in range(EXPERTS):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {f"{expert}w1.weight": (hidden, dim), f"{expert}w2.weight": (dim, hidden)}
            shapes |= {f"{expert}w3.weight": (hidden, dim)}
        shapes[f"{layer}block_sparse_moe.gate.weight"] = (EXPERTS, dim)
        shapes |= {f"{layer}{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    with safetensors_files.Writer(
        path / "model.safetensors", {name: (shape, bfloat16) for name, shape in shapes.items()}
    ) as file:
        for name, shape in shapes.items():
            # The upper halves of float32 numbers: drawing them all as normal takes long.
            file.write(name, [rng.integers(0x3C00, 0x3E00, shape, np.uint16).view(bfloat16)])
    config = {
        "model_type": "mixtral",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "vocab_size": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.model").write_bytes(b"a tokenizer")
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small checkpoint, and one whose largest parameter is LARGEST bytes."""
    path = tmp_path_factory.mktemp("sources")
    return write_mixtral(path / "small", 64, 64), write_mixtral(path / "large", DIM, HIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "accessory", "mixtral"])
def test_convert(sources, tmp_path, format):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CONVERT, *map(str, sources), str(tmp_path / "out"), format]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.3 * LARGEST
