"""What few bits cost: the shipped nano on all held-out questions, the bytes of the real model's weights, and the
scores of the reference model in tests/golden, of which the original program computed the exact ones.

python benchmarks/quantization.py
"""

import json
import tarfile
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import sharding
import sphinx_jax
from sphinx_jax.config import preset
from sphinx_jax.data import easy_vqa
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params

KINDS = (None, "int8", "int4")
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def main() -> None:
    mesh = sharding.make_mesh()
    print("| weights | nano, all | nano, open | its scores, relative | sphinx-moe, GiB | of bfloat16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    exact, whole = None, bytes_of("sphinx-moe", None, mesh)
    for kind in KINDS:
        model = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, "float32", max_model_len=256, quantize=kind)
        overall, open_questions = accuracy(model)
        tokens = np.random.default_rng(0).integers(3, 400, (8, 32)).astype(np.int32)
        scores = np.asarray(model.logits(tokens))
        exact = scores if exact is None else exact
        error = np.linalg.norm(scores - exact) / np.linalg.norm(exact)
        size = bytes_of("sphinx-moe", kind, mesh)
        print(
            f"| {kind or 'as they are'} | {overall:.2%} | {open_questions:.2%} | {error:.1e} | {size / 2**30:.1f} | "
            f"{size / whole:.3f} |",
            flush=True,
        )
    print()
    print("| reference model | mean difference | largest | relative | best word the same |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = reference_checkpoint(Path(folder))
        for dtype, kind in (("bfloat16", None), ("float32", "int8"), ("float32", "int4")):
            model = sphinx_jax.load(checkpoint, mesh, dtype, quantize=kind)
            mean, largest, relative, same = reference_errors(model)
            print(f"| {kind or dtype} | {mean:.3f} | {largest:.2f} | {relative:.1e} | {same:.1%} |", flush=True)


def reference_checkpoint(folder: Path) -> Path:
    """SPHINX-MoE at small size with random weights, as the original program saved it."""
    with tarfile.open(GOLDEN / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    described = [GOLDEN / "ens" / f"{name}.json" for name in ("config", "meta", "vision")]
    for file in (*described, GOLDEN / "tokenizer" / "tokenizer.model"):
        (folder / "mp1" / file.name).symlink_to(file)
    return folder / "mp1"


def reference_errors(model: sphinx_jax.Sphinx) -> tuple[float, float, float, float]:
    """Of its scores on two conversations about pictures, against the original's in float32: the mean and the largest
    absolute difference, the difference by norm, and the share of positions whose best word is the same."""
    pixels = np.asarray(Image.open(GOLDEN / "ens" / "image_padded_resized.png"))
    with np.load(GOLDEN / "ens" / "inputs.npz") as inputs, np.load(GOLDEN / "ens" / "expected.npz") as expected:
        exact, best = expected["train_logits_cols"], expected["train_logits_argmax"]
        scores = np.asarray(model.logits(inputs["examples"][:, : best.shape[1]], [pixels, pixels[:, ::-1]]))
    off = scores[..., ::125] - exact
    relative = np.linalg.norm(off) / np.linalg.norm(exact)
    return np.abs(off).mean(), np.abs(off).max(), relative, (scores.argmax(-1) == best).mean()


def accuracy(model: sphinx_jax.Sphinx) -> tuple[float, float]:
    """Of all held-out questions, and of those that are not answered by yes or no."""
    asked = [(record.id, question) for record in easy_vqa.load("test") for question in record.questions]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "questions.jsonl", Path(folder) / "answers.jsonl"
        lines = (
            {"id": i, "image": str(easy_vqa.image_file("test", number)), "prompt": question.text}
            for i, (number, question) in enumerate(asked)
        )
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        list(model.answer_file(source, out, max_new_tokens=8))
        answers = {line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
    right = np.array([answers[i] == question.answer for i, (_, question) in enumerate(asked)])
    is_open = np.array([question.answer not in ("yes", "no") for _, question in asked])
    return right.mean(), right[is_open].mean()


def bytes_of(name: str, kind: str | None, mesh: jax.sharding.Mesh) -> int:
    make = lambda rngs: SphinxMoE(preset(name), unstacked=True, rngs=rngs)
    _, params = sharding.abstract_params(make, mesh, dtype=jnp.bfloat16)
    return sharding.bytes_per_device(abstract_quantized_params(params, kind) if kind else params)


if __name__ == "__main__":
    main()
