"""Draw docs/mesh.svg: the shards of Mixtral-8x7B on each of eight devices, from the table of axis rules.

python docs/draw_mesh.py
"""

import functools
from pathlib import Path
from typing import Any

import jax

import sharding
from sphinx_jax.config import mixtral_8x7b
from sphinx_jax.language.decoder import Decoder

WIDTH, HEIGHT, GAP, TOP = 262, 142, 14, 64
# Lines of a device: label, path of a parameter, its dimension, and the number of heads per index.
LINES = [
    ("experts", ("layers", "ffn", "w_in"), 1, 1),
    ("hidden", ("layers", "ffn", "w_in"), 4, 1),
    ("heads", ("layers", "attention", "wqkv"), 2, 4),
    ("vocabulary", ("head", "kernel"), 1, 1),
    ("embedding", ("layers", "ffn", "w_in"), 2, 1),
]


def main() -> None:
    sharding.simulate_devices(8)
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    config = mixtral_8x7b().language
    params: Any
    _, params = sharding.abstract_params(lambda rngs: Decoder(config, rngs=rngs), mesh, dtype=jax.numpy.bfloat16)
    gib = sharding.bytes_per_device(params) / 2**30
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / 2**30

    parts = [text(GAP, 26, "Mesh fsdp 2 × expert 2 × tensor 2: shards of Mixtral-8x7B per device", 16, "bold")]
    parts.append(
        text(GAP, 48, f"{gib:.2f} of {total:.2f} GiB in bfloat16 per device; the batch is sharded over fsdp", 12)
    )
    for fsdp, expert, tensor in [(f, e, t) for f in range(2) for e in range(2) for t in range(2)]:
        device = mesh.devices[0, fsdp, expert, tensor]
        x, y = GAP + (expert * 2 + tensor) * (WIDTH + GAP), TOP + fsdp * (HEIGHT + GAP)
        fill = ("#e8f1fb", "#fdf1e0")[expert]
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="#667"/>')
        title = f"device {device.id}: fsdp {fsdp}, expert {expert}, tensor {tensor}"
        parts.append(text(x + 10, y + 22, title, 12, "bold"))
        for row, (label, path, dim, scale) in enumerate(LINES):
            leaf = functools.reduce(lambda tree, key: tree[key], path, params)
            part = leaf.sharding.devices_indices_map(leaf.shape)[device][dim]
            first, last, _ = part.indices(leaf.shape[dim])
            line = f"{label} {first * scale} to {last * scale - 1} of {leaf.shape[dim] * scale}"
            parts.append(text(x + 10, y + 46 + 20 * row, line, 12))
    width, height = GAP + 4 * (WIDTH + GAP), TOP + 2 * (HEIGHT + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    svg = "\n".join([head, background, *parts, "</svg>\n"])
    (Path(__file__).parent / "mesh.svg").write_text(svg)


def text(x: int, y: int, content: str, size: int, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="#223">{content}</text>'


if __name__ == "__main__":
    main()
